"""A function of TorchScript, which runs without Python."""

import torch


@torch.jit.script
def f(x: torch.Tensor) -> torch.Tensor:
    return torch.relu(x)


f(torch.randn(3))
