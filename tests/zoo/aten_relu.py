"""relu from torch.ops, past the Python functions."""

import torch

torch.ops.aten.relu(torch.randn(3))
