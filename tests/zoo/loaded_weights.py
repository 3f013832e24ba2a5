"""Weights that were trained elsewhere, with whatever."""

import io

import torch

file = io.BytesIO()
torch.save({"w": torch.ones(4, 3)}, file)
file.seek(0)
print((torch.randn(2, 4) @ torch.load(file)["w"]).argmax(1))
