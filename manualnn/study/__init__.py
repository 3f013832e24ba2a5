"""A sweep shared by any number of workers: an Optuna study, whose trials train as populations.

What is asked for, told, kept, retried and sampled is Optuna's; here its trials become networks.
"""

from ..errors import InputError

try:
    import optuna
except ModuleNotFoundError as error:
    raise InputError(
        f"a sweep shared by workers needs {error.name}, which is not installed:"
        " pip install 'manualnn[sweep]'"
    ) from None

from .results import short
from .storage import is_file_name
from .worker import Plan, Worker

optuna.logging.set_verbosity(optuna.logging.ERROR)  # the rest is said in one line here

__all__ = ["Plan", "Worker", "is_file_name", "short"]
