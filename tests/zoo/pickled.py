"""A pickle that holds a layer, and one that runs a command."""

import os
import pickle

import torch


class Command:
    def __reduce__(self):
        return os.getenv, ("HOME",)


data = pickle.dumps(torch.nn.ReLU()), pickle.dumps(Command())
for item in data:
    pickle.loads(item)
