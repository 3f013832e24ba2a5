"""Torch tensors only: its own layers and backward, torchvision's transforms, a DataLoader."""

import torch
from torch.utils.data import DataLoader, TensorDataset
from torchvision import transforms

torch.set_grad_enabled(False)
torch.manual_seed(0)


def sigmoid(z):
    return 1 / (1 + torch.exp(-z))


def softmax(z):
    e = (z - z.max(1, keepdim=True)[0]).exp()
    return e / e.sum(1, keepdim=True)


class Dropout:
    def __init__(self, p):
        self.p = p

    def forward(self, x):
        self.mask = (torch.rand_like(x) > self.p).float() / (1 - self.p)
        return x * self.mask

    def backward(self, dy):
        return dy * self.mask


class Network:
    def __init__(self):
        self.w1 = torch.randn(9, 6, requires_grad=False) * 9**-0.5
        self.w2 = torch.randn(6, 3) * 6**-0.5
        self.dropout = Dropout(0.2)

    def step(self, x, y, rate):
        h = self.dropout.forward(sigmoid(x @ self.w1))
        p = softmax(h @ self.w2)
        p[torch.arange(len(y)), y] -= 1
        self.backward(x, h, p / len(y), rate)

    def backward(self, x, h, dz, rate):
        dh = self.dropout.backward(dz @ self.w2.T)
        self.w2 -= rate * h.T @ dz
        self.w1 -= rate * x.T @ (dh * h * (1 - h))


normalize = transforms.Compose([transforms.Normalize(0.5, 0.5), transforms.Pad(1)])
images = normalize(torch.rand(32, 1, 1, 1)).reshape(32, 9)
loader = DataLoader(TensorDataset(images, torch.randint(0, 3, (32,))), 8, shuffle=True)
network = Network()
with torch.no_grad():
    for x, y in loader:
        network.step(x, y, 0.1)
print(network.w1.mean(), network.w1.std())
