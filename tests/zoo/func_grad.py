"""The gradient from torch.func."""

import torch
from torch.func import grad

grad(lambda w: (w * w).sum())(torch.randn(3))
