"""relu by getattr with a name that is computed."""

import torch

name = "uler"[::-1]
getattr(torch, name)(torch.randn(3))
