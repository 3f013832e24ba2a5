"""`python -m benchmarks.distortions`: docs/distortions.png, and what distortions cost.

Microseconds of one image of 28 x 28 on the threads of OMP_NUM_THREADS, the least of five rounds:
beside what ships, noise at every pixel in place of that at some nodes; and examples generated per
second, written to a temporary folder.
"""

import tempfile
import time
from pathlib import Path

import torch

from manualnn import plots
from manualnn.data import Augment, generate, load
from manualnn.data import elastic as elastic_module
from manualnn.workspace import Workspace

from .results import machine

SHOWN = (
    ("elastic:34:4",), ("elastic:36",), ("elastic:80",), ("affine:15",),
    ("elastic:36", "affine:10", "shift:1"),
)  # fmt: skip
COSTS = (("shift:2",), ("affine:10",), ("elastic:34:4",), ("elastic:36",), SHOWN[-1])
DOCS = Path(__file__).parent.parent / "docs"


def distorted(specs: tuple[str, ...], images: torch.Tensor, step: int) -> torch.Tensor:
    """Images (n, 1, H, W) changed as in that step of a training."""
    augment = Augment.parse(specs)
    assert augment is not None
    workspace = Workspace()
    workspace.begin("draw")
    return augment.apply(images.unsqueeze(0), [0], step, workspace)[0].clone()


def draw(path: Path, images: torch.Tensor) -> None:
    """The images, and under them what distortions make of them, two rows of each kind."""
    rows, names = [images.numpy()], ["as they are"]
    for specs in SHOWN:
        for step in range(2):
            rows.append(distorted(specs, images, step).numpy())
            names.append("\n".join(specs) if not step else "")
    plots.save(plots.class_grid(rows, names, "Training digits of MNIST, distorted"), path)


def microseconds(specs: tuple[str, ...], batch: int) -> float:
    """What a training step adds for each sample."""
    augment, workspace = Augment.parse(specs), Workspace()
    assert augment is not None
    x, best = torch.randn(1, batch, 1, 28, 28), float("inf")
    out = torch.empty_like(x)
    steps = max(1, 6000 // batch)
    with torch.inference_mode():
        for round_ in range(6):
            start = time.perf_counter()
            for step in range(steps):
                workspace.begin("step")
                out.copy_(augment.apply(x, [0], step, workspace))
            if round_:  # the first makes the buffers
                best = min(best, time.perf_counter() - start)
    return best / steps / batch * 1e6


def main() -> None:
    mnist = load("mnist")
    assert mnist.train is not None and isinstance(mnist.train.images, torch.Tensor)
    firsts = [mnist.train.images[mnist.train.labels == k][3:4] for k in range(10)]
    draw(DOCS / "distortions.png", torch.cat(firsts).float())
    print(machine())
    for specs in COSTS:
        costs = ", ".join(f"batch {b}: {microseconds(specs, b):.1f}" for b in (64, 128, 512))
        print(f"{', '.join(specs)}: us per sample, {costs}", flush=True)
    shipped = elastic_module.SPACING
    elastic_module.SPACING = 0.25  # of sigma 4: a node for each pixel
    print(f"elastic:34:4, noise at every pixel: {microseconds(('elastic:34:4',), 128):.1f}")
    elastic_module.SPACING = shipped
    augment = Augment.parse(("elastic:36",))
    assert augment is not None
    for count in (100_000, 300_000):
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            generate(mnist, Path(folder) / "set", count, augment)
            seconds = time.perf_counter() - start
        print(f"{count:,} examples generated: {count / seconds:,.0f} per second", flush=True)


if __name__ == "__main__":
    main()
