"""torch.optim in a helper file."""

import torch
from helper import make

w = torch.randn(3)
update = make([w])
w.grad = 2 * w
update.step()
