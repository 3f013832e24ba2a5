"""exec of a text that is put together."""

import torch  # noqa: F401

code = ["y = torch.nn", "functional", "gelu(torch.randn(3))"]
exec(".".join(code))
