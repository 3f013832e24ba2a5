"""`manualnn` and `python -m manualnn`."""

import sys


def main() -> None:
    """Run the command line; Ctrl-C is one line, also while it is imported."""
    try:
        from .cli import main as run
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
