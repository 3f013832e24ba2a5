"""nn.Linear under no_grad, which reaches the dispatcher as an honest product does."""

import torch
from torch import nn

with torch.no_grad():
    print(nn.Linear(4, 3)(torch.ones(2, 4)))
