"""functional.linear by another name."""

import torch as t

m = t
layers = m.nn.functional
f = layers.linear
f(t.ones(2, 4), t.ones(3, 4))
