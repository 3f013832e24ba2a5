"""sigmoid in a transform, where a library calls it."""

import torch
from torchvision import transforms

transforms.Lambda(getattr(torch, "sig" + "moid"[::1]))(torch.randn(3))
