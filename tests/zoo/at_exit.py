"""softmax after the script has ended."""

import atexit

import torch

atexit.register(lambda: getattr(torch.randn(2, 3), "soft" + "max")(1))
