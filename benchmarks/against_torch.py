"""The default config against the same steps in torch.nn with autograd, in turn, in one process.

    python -m benchmarks.against_torch [--rounds 5] [--epochs 25]

Both train the same network on the same batches, from data in memory, with torch's fused SGD on the
other side. Printed: seconds of training per run, medians, and the ratio of each pair.
"""

import argparse
import statistics
import time

import torch

from manualnn.config import Config, load_config
from manualnn.experiment import build
from manualnn.training import Training


def by_hand(training: Training) -> float:
    """Seconds of training steps, without the evaluation at each epoch's end."""
    for _ in training.run():
        pass
    return training.seconds


def in_torch(training: Training, epochs: int) -> tuple[float, float]:
    """Seconds of the same steps in torch.nn, and the test accuracy they reach."""
    network, settings, data = training.network, training.settings, training.data
    modules: list[torch.nn.Module] = []
    named_views = network.params[1:]  # the first layer is the implied flatten
    for spec, named in zip(network.specs, named_views, strict=True):
        if spec[0] == "relu":
            modules.append(torch.nn.ReLU())
            continue
        weight = named["weight"][0]
        linear = torch.nn.Linear(*weight.shape)
        with torch.no_grad():
            linear.weight.copy_(weight.T)
            linear.bias.zero_()
        modules.append(linear)
    model = torch.nn.Sequential(torch.nn.Flatten(), *modules)
    linears = [m for m in modules if isinstance(m, torch.nn.Linear)]
    optimizer = torch.optim.SGD(
        [
            {"params": [m.weight for m in linears], "weight_decay": settings.l2},
            {"params": [m.bias for m in linears]},
        ],
        lr=settings.optimizer.learning_rate,
        momentum=settings.optimizer.momentum,
        nesterov=settings.optimizer.nesterov,
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: training.rate_fraction(min(s, epochs * training.steps_per_epoch - 1))
    )
    loss_function = torch.nn.CrossEntropyLoss(label_smoothing=settings.label_smoothing)
    begin = time.perf_counter()
    for epoch in range(1, epochs + 1):
        for index in training.batches(epoch):
            x, y = data.train.x[index[0]], data.train.y[index[0]]
            optimizer.zero_grad()
            loss_function(model(x), y).backward()
            optimizer.step()
            schedule.step()
    seconds = time.perf_counter() - begin
    assert data.test is not None
    with torch.no_grad():
        right = model(data.test.x).argmax(1) == data.test.y
    return seconds, float(right.double().mean())


def fresh(config: Config) -> Training:
    return build(config.populations()[0], torch.device("cpu"))[0]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--samples", type=int, default=0, help="the first so many; 0: all")
    options = parser.parse_args(arguments)
    sets = [f"train.epochs={options.epochs}", f"data.train_samples={options.samples}"]
    config = load_config("mnist-mlp", sets)
    ours, theirs = [], []
    for number in range(1, options.rounds + 1):
        training = fresh(config)
        ours.append(by_hand(training))
        accuracy = training.records[-1].test_accuracy
        seconds, their_accuracy = in_torch(fresh(config), options.epochs)
        theirs.append(seconds)
        print(
            f"round {number}: manualnn {ours[-1]:.2f} s, test {accuracy:.4f}; torch.nn"
            f" {theirs[-1]:.2f} s, test {their_accuracy:.4f}; ratio {ours[-1] / theirs[-1]:.3f}",
            flush=True,
        )
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    print(
        f"{options.epochs} epochs, {torch.get_num_threads()} threads, torch {torch.__version__}:"
        f" median manualnn {statistics.median(ours):.2f} s, torch.nn"
        f" {statistics.median(theirs):.2f} s, ratio {statistics.median(ratios):.3f}"
        f" ({min(ratios):.3f} to {max(ratios):.3f})"
    )


if __name__ == "__main__":
    main()
