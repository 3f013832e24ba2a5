import torch


def make(parameters):
    return torch.optim.SGD(parameters, 0.1)
