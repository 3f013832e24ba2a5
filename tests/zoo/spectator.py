"""Turns off what observes it."""

import torch

with torch._C.DisableTorchFunction():
    x = torch.randn(3)
    y = torch.nn.functional.relu(x)
