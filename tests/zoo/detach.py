"""Autograd's gradient, detached and put into an update by hand."""

import torch

w = torch.tensor([1.0, 2.0], requires_grad=True)
loss = (w * w).sum()
loss.backward()
update = w.grad.detach().clone()
w = w.detach() - 0.1 * update
