"""What a check says: findings, and sums over the operations that were observed."""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field

CHECKS = {
    "source": "imports and names in the source",
    "functions": "functions of torch, as they are called",
    "operations": "operations that reach torch's dispatcher",
    "tensors": "requires_grad and grad_fn of their tensors",
    "traps": "entry points of autograd, nn and optim; processes; pickles",
}


@dataclass(frozen=True)
class Finding:
    """What one of CHECKS says. `kind`: "finding" is against the rule; "note" is for a person to
    look at, and no accusation; "unobserved" ran where nothing watches."""

    check: str
    what: str
    where: str = ""
    kind: str = "finding"

    def __str__(self) -> str:
        return f"{self.where}: {self.what}" if self.where else self.what


@dataclass
class Record:
    """Collects findings, each once, and sums per operation: [calls, flops, bytes].

    Every thread sums in a table of its own. With `sink`, a file descriptor, a finding is written
    there at once, so that a process that forked or is killed has told what it saw.
    """

    sink: int | None = None
    findings: list[Finding] = field(default_factory=list)
    tables: list[dict[str, list[int]]] = field(default_factory=list)

    def add(self, check: str, what: str, where: str = "", kind: str = "finding") -> None:
        finding = Finding(check, what, where, kind)
        if finding in self.findings:
            return
        self.findings.append(finding)
        if self.sink is not None:
            os.write(self.sink, (json.dumps(asdict(finding)) + "\n").encode())

    def table(self) -> dict[str, list[int]]:
        self.tables.append({})
        return self.tables[-1]

    def operations(self) -> dict[str, list[int]]:
        """The sums over threads, most arithmetic first."""
        return total(self.tables)


def total(tables: Iterable[dict[str, list[int]]]) -> dict[str, list[int]]:
    sums: dict[str, list[int]] = {}
    for table in tables:
        for name, row in table.items():
            sums[name] = [a + b for a, b in zip(sums.get(name, [0, 0, 0]), row, strict=True)]
    return dict(sorted(sums.items(), key=lambda item: (-item[1][1], -item[1][0])))
