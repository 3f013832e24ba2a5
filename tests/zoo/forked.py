"""A built-in activation in processes that multiprocessing forks."""

import multiprocessing

import torch


def work(i):
    return float(getattr(torch.randn(3), "tan" + "h")().sum())


if __name__ == "__main__":
    with multiprocessing.get_context("fork").Pool(1) as pool:
        pool.map(work, range(2))
