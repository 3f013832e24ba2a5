"""torch.nn by importlib."""

import importlib

import torch

functional = importlib.import_module("torch." + "nn" + ".functional")
functional.softmax(torch.randn(2, 3), 1)
