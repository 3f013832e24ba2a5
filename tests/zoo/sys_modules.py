"""torch.nn from sys.modules."""

import sys

import torch

sys.modules["torch.nn"].functional.relu(torch.randn(3))
