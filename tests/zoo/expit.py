"""The sigmoid by its name in torch.special."""

import torch

torch.special.expit(torch.randn(3))
