"""A sweep's populations against the same networks one after another, in turn, in one process.

    python -m benchmarks.against_singles fashion-logistic [--data DIR] [--epochs 15]

Printed for each population: seconds of training steps together and alone, and their ratio. Reading
the data and measuring the networks are in neither.
"""

import argparse
from dataclasses import replace

import torch

from manualnn.config import Population, data_flags, load_config
from manualnn.experiment import build
from manualnn.sweep import configure


def seconds(population: Population, data: dict) -> tuple[float, list[float]]:
    """Seconds of training steps, and the training loss that each network ends with."""
    training, _ = build(population, torch.device("cpu"), data)
    for _ in training.run():
        pass
    return training.seconds, [record.train_loss for record in training.last_records()]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config")
    parser.add_argument("--data")
    parser.add_argument("--data-dir")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--set", action="append", default=[])
    options = parser.parse_args(arguments)
    flags = {"train.epochs": options.epochs, **data_flags(options.data, options.data_dir)}
    config = load_config(options.config, options.set, flags)
    data: dict = {}
    total = [0.0, 0.0]
    for population in configure(config, config.name).populations():
        together, losses = seconds(population, data)
        singles = [
            seconds(replace(population, replicas=(replica,)), data)
            for replica in population.replicas
        ]
        alone = sum(time for time, _ in singles)
        worst = max(abs(a - b[0]) for a, (_, b) in zip(losses, singles, strict=True))
        total = [total[0] + together, total[1] + alone]
        print(
            f"{len(losses)} networks: together {together:.1f} s, one after another {alone:.1f} s,"
            f" ratio {together / alone:.2f}; losses differ by at most {worst:.1e}",
            flush=True,
        )
    print(f"all: {total[0]:.1f} s against {total[1]:.1f} s, ratio {total[0] / total[1]:.2f}")


if __name__ == "__main__":
    main()
