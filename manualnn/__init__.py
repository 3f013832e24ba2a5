"""Neural networks whose gradients are derived by hand, in raw torch tensors.

Names are imported when they are first used: `import manualnn` and `manualnn --help` are quick.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import Config, load_config
    from .coursework import count_parameters, evaluate_hw1
    from .errors import InputError
    from .evaluation import evaluate_weights, predict_file
    from .experiment import train
    from .network import Network, load_weights, save_weights

__all__ = [
    "Config",
    "InputError",
    "Network",
    "count_parameters",
    "evaluate_hw1",
    "evaluate_weights",
    "load_config",
    "load_weights",
    "predict_file",
    "save_weights",
    "train",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its module on first use (PEP 562)."""
    if name in ("Config", "load_config"):
        from . import config

        return vars(config)[name]
    if name == "InputError":
        from . import errors

        return errors.InputError
    if name in ("count_parameters", "evaluate_hw1"):
        from . import coursework

        return vars(coursework)[name]
    if name in ("evaluate_weights", "predict_file"):
        from . import evaluation

        return vars(evaluation)[name]
    if name == "train":
        from . import experiment

        return experiment.train
    if name in ("Network", "load_weights", "save_weights"):
        from . import network

        return vars(network)[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
