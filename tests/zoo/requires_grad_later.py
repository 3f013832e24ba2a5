"""autograd.grad on a tensor that is switched on by setattr."""

import torch

w = torch.randn(3)
setattr(w, "requires" + "_grad", True)
torch.autograd.grad((w * w).sum(), w)
