"""How the time of an epoch grows with width, depth, batch size, samples and networks: log-log."""

import math
import statistics
from pathlib import Path

import numpy as np

from .against_peers import measure
from .results import machine, table, write_section

PEERS = ["manualnn", "torch eager"]
ALONG = {
    "width": ("units of both hidden layers", [16, 32, 64, 128, 256, 512, 1024, 2048]),
    "depth": ("hidden layers of 128", [1, 2, 4, 8, 16]),
    "batch_size": ("batch size", [16, 32, 64, 128, 256, 512, 1024, 4096]),
    "samples": ("samples", [1000, 3000, 10_000, 30_000, 60_000]),
    "networks": ("networks R, each its own batches", [1, 2, 4, 8, 16, 32, 64]),
}


def slope(x: list[float], y: list[float]) -> float:
    """The exponent b of y = a x^b, by least squares on logarithms."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def main(quick: bool) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 3.6), layout="constrained")
    rows = []
    for axes, (key, (title, values)) in zip(figure.subplots(1, len(ALONG)), ALONG.items(),
                                            strict=True):  # fmt: skip
        values = values[::2] if quick else values
        times: dict[str, list[float]] = {peer: [] for peer in PEERS}
        for value in values:
            found = measure(f"W1:{key}={value}", PEERS, 2 if quick else 4, 0.2 if quick else 0.5)
            for worker in found:
                seconds = statistics.median(worker.seconds) if worker.seconds else math.nan
                times[worker.peer].append(seconds)
            print(f"{title} {value}: {times['manualnn'][-1]:.3f} s", flush=True)
        for peer, seconds in times.items():
            known = [(v, s) for v, s in zip(values, seconds, strict=True) if math.isfinite(s)]
            if not known:
                continue
            x, y = ([float(pair[i]) for pair in known] for i in (0, 1))
            axes.loglog(x, y, marker="o", label=peer)
            if len(x) > 2:
                ends = f"{slope(x[:3], y[:3]):.2f}", f"{slope(x[-3:], y[-3:]):.2f}"
                cells = [f"{v:g}: {s:.3f}" for v, s in zip(x, y, strict=True)]
                rows.append((title, peer, *ends, ", ".join(cells)))
        axes.set_xlabel(title)
        axes.set_ylabel("seconds per epoch")
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=8)
    figure.savefig(Path(__file__).parent / "growth.png", dpi=110)
    heads = ("along", "", "exponent, small", "exponent, large", "seconds per epoch")
    text = f"{machine()}. W1 with one quantity changed; exponents of the first and last three.\n\n"
    write_section("Growth", text + table(heads, rows) + "\n\n![Growth](growth.png)")
