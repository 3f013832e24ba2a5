"""`python -m benchmarks [NAME]`: what is measured, how long it takes, and where it is written.

    peers     seconds per epoch of W1 to W6S against every peer that is installed (12 min)
    growth    time against width, depth, batch size, samples and networks (6 min)
    accuracy  seconds of training until 97, 98 and 99 % of the test images are right (6 min)
    steady    bytes allocated and page faults per step (1 min)
    gpu       the peers on a GPU, and populations of up to 4096 networks (10 min)

`--quick` takes few rounds of short parts, under 3 minutes. Sections of benchmarks/RESULTS.md and
plots beside it are what it leaves.
"""

import argparse

from . import accuracy, against_peers, gpu, growth, steady
from .works import WORKS

CPU_PEERS = ["manualnn", "manualnn bf16", "torch eager", "torch compile", "torch ensemble", "JAX",
             "scikit-learn", "only products"]  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    names = ("peers", "growth", "accuracy", "steady", "gpu")
    parser.add_argument("name", nargs="?", default="peers", choices=names)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--works", help="some of " + ",".join(WORKS))
    parser.add_argument("--peers", help="some of " + ", ".join(CPU_PEERS))
    parser.add_argument("--rounds", type=int)
    options = parser.parse_args(arguments)
    works = options.works.split(",") if options.works else list(WORKS)
    if options.name == "peers":
        peers = options.peers.split(",") if options.peers else CPU_PEERS
        if options.quick and not options.peers:
            peers = ["manualnn", "torch eager", "torch ensemble", "JAX", "scikit-learn"]
        rounds = options.rounds or (3 if options.quick else 9)
        seconds = 0.3 if options.quick else 0.8
        section = "Quick" if options.quick else "Peers"
        against_peers.main(works, rounds, seconds, "cpu", peers, section)
    elif options.name == "growth":
        growth.main(options.quick)
    elif options.name == "accuracy":
        accuracy.main(2 if options.quick else 5)
    elif options.name == "steady":
        steady.main()
    else:
        gpu.main(options.quick)


if __name__ == "__main__":
    main()
