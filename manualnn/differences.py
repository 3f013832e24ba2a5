"""Central differences, and whether a gradient is what they say.

A difference is (f(v + h) - f(v - h)) / 2h, for many coordinates of a tensor at once, as replicas.
Where a function takes another branch at v - h or v + h, as a ReLU does at 0 and a pooling at a tie,
it is no derivative: h is made smaller, and what crosses a kink even at 1e-7 is skipped and counted.

Shapes: R replicas, k coordinates of one tensor.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

BAR = 1e-5  # the relative error that is allowed
STEPS = (1e-5, 1e-6, 1e-7)  # times |v| where that is above 1
FLOOR = 1e-3  # of a tensor's largest gradient
# R values of a tensor, (R, ...), to terms (R, m), whose sum is the scalar, and the branches (R, n)
# that are taken, as integers.
Function = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Row:
    """What the check of one tensor found.

    `part` is a layer as "linear 2", "loss", "penalty" or "network"; `index` is the place of the
    worst error in `shape`. Of its coordinates `tried` were chosen and `skipped` at kinks or
    ties. `verdict` is "ok", "zero" (ok, all is 0), "wrong" or "not judged"; `how` is what is wrong.
    """

    part: str
    tensor: str
    shape: tuple[int, ...]
    worst: float | None = None
    median: float | None = None
    index: tuple[int, ...] | None = None
    tried: int = 0
    skipped: int = 0
    verdict: str = "wrong"
    how: str = ""

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def right(self) -> bool:
        return self.verdict in ("ok", "zero")


@dataclass(frozen=True)
class Report:
    """The rows of one network or function; `title` says which, `notes` what else is to be said."""

    title: str
    rows: list[Row]
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return all(row.right for row in self.rows)

    @property
    def wrong(self) -> list[Row]:
        return [row for row in self.rows if row.verdict == "wrong"]

    @property
    def finding(self) -> str:
        """What the rows say together: the parts that are wrong by themselves, if any are."""
        parts: dict[str, list[str]] = {r.part: [] for r in self.wrong if r.part != "network"}
        if parts:
            for row in self.wrong:
                if row.part in parts:
                    parts[row.part].append(row.tensor + (f" ({row.how})" if row.how else ""))
            named = [f"{part}: {', '.join(tensors)}" for part, tensors in parts.items()]
            return f"wrong: {'; '.join(named)}"
        if self.wrong:
            names = ", ".join(row.tensor for row in self.wrong)
            return f"wrong: the whole network ({names}), though each part of it is right by itself"
        if unjudged := [f"{row.part} {row.tensor}" for row in self.rows if not row.right]:
            why = "too many kinks, or below what differences resolve"
            return f"not judged, {why}: {'; '.join(unjudged)}"
        worst = max((row.worst or 0.0 for row in self.rows), default=0.0)
        return f"passed: {len(self.rows)} gradients, worst relative error {worst:.1e}"


def differences(
    function: Function, at: Tensor, coordinates: Tensor, most: int = 64
) -> tuple[Tensor, Tensor, Tensor]:
    """Central differences (k,) at `at`, how far rounding may have moved each, and where none of the
    steps is free of a kink.

    Terms are subtracted before they are summed, so that those without the coordinate cancel.
    """
    flat, count = at.flatten(), len(coordinates)
    _, here = function(at.unsqueeze(0))
    numeric, noise = (flat.new_zeros(count) for _ in range(2))
    kinked = torch.ones(count, dtype=torch.bool, device="cpu")
    for step in STEPS:
        left = kinked.nonzero().flatten()
        for todo in left.split(most) if len(left) else ():
            chosen, n = coordinates[todo], len(todo)
            h = step * flat[chosen].abs().clamp(min=1)
            up, down = flat[chosen] + h, flat[chosen] - h
            width = up - down  # as rounded
            copies = flat.repeat(2 * n, 1)
            copies[torch.arange(2 * n, device="cpu"), chosen.repeat(2)] = torch.cat([up, down])
            terms, branches = function(copies.view(-1, *at.shape))
            numeric[todo] = (terms[:n] - terms[n:]).sum(1) / width
            noise[todo] = 10 * torch.finfo(at.dtype).eps * terms[:n].norm(dim=1) / width
            same = (branches == here).all(1)
            kinked[todo] = ~(same[:n] & same[n:])
    return numeric, noise, kinked


def judge(
    part: str,
    tensor: str,
    shape: tuple[int, ...],
    coordinates: Tensor,
    analytic: Tensor,
    numeric: Tensor,
    noise: Tensor,
    kinked: Tensor,
    bar: float = BAR,
) -> Row:
    """The row of a tensor whose gradient is `analytic` (k,) at the `coordinates`.

    The relative error is |a - n| / max(|a|, |n|, floor). The floor is a thousandth of the largest
    |a| or |n|, as of smaller ones only the difference matters to a step, and at least what makes an
    error as large as the rounding count as the bar. Not judged: a tensor with more than three
    quarters of its coordinates skipped, or one where rounding is above a hundredth of the largest.
    """
    kept = ~kinked
    a, n, noise = analytic[kept], numeric[kept], noise[kept]
    size = a.nan_to_num(0, 0, 0).abs().maximum(n.abs())
    scale = float(size.amax()) if len(size) else 0.0
    errors = (a - n).abs() / size.clamp(min=FLOOR * scale).maximum(noise / bar).clamp(min=1e-300)
    errors = torch.where(errors.isfinite(), errors, torch.inf)
    worst = int(errors.argmax()) if len(errors) else None
    if worst is not None and not float(errors[worst]) <= bar:
        verdict = "wrong"
    elif 4 * len(a) < len(kinked):
        verdict = "not judged"
    elif not bool(a.any()) and bool((n.abs() <= noise).all()):
        verdict = "zero"
    else:
        verdict = "ok" if float(noise.amax()) <= 0.01 * scale else "not judged"
    row = Row(part, tensor, shape, tried=len(kinked), skipped=int(kinked.sum()), verdict=verdict)
    if worst is None:
        return row
    index = tuple(map(int, torch.unravel_index(coordinates[kept][worst], shape)))
    return replace(row, worst=float(errors[worst]), median=float(errors.median()), index=index)


def lines(reports: list[Report]) -> Iterator[str]:
    """The reports for a reader."""
    for report in reports:
        yield report.title
        header = ("worst", "median", "at", "checked", "skipped")
        yield (
            f"{'':<27}{header[0]:>9}{header[1]:>10}  {header[2]:<18}{header[3]:>16}{header[4]:>9}"
        )
        for row in report.rows:
            yield f"{row.part:<19} {row.tensor:<7}{_figures(row)}  {row.verdict}"
        yield report.finding
        yield from report.notes
        yield ""


def _figures(row: Row) -> str:
    worst, median = ("-" if v is None else f"{v:.1e}" for v in (row.worst, row.median))
    at = "-" if row.index is None else ", ".join(map(str, row.index))
    checked = f"{row.tried - row.skipped} of {row.size:,}"
    return f"{worst:>9}{median:>10}  {at:<18}{checked:>16}{row.skipped:>9}"


def to_dict(reports: list[Report]) -> dict[str, Any]:
    """The reports as plain values."""
    each = [
        {
            "title": report.title,
            "passed": report.passed,
            "finding": report.finding,
            "notes": report.notes,
            "rows": [asdict(row) | {"size": row.size} for row in report.rows],
        }
        for report in reports
    ]
    return {"passed": all(report.passed for report in reports), "reports": each}
