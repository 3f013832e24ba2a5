"""relu as a method of a tensor."""

import torch

x = torch.randn(3)
x.relu_()
