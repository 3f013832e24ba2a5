"""torch.compile of a layer."""

import torch

layer = torch.compile(torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Sigmoid()))
layer(torch.randn(2, 3))
