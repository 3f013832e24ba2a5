"""Where a study is kept, a journal file or a database, and the signs of life of its trials."""

import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread
from typing import Any

import sqlalchemy
from optuna import Study
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import (
    BaseStorage,
    JournalStorage,
    RDBStorage,
    RetryHeartbeatStaleTrialCallback,
    get_storage,
)
from optuna.storages._heartbeat import BaseHeartbeat
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import ArgumentError, DBAPIError, OperationalError, SQLAlchemyError

from ..errors import InputError

RETRIES = 10  # of a trial whose workers die
BEATS = 4  # missed signs of life, and a trial's worker is taken for dead
DRIVERS = {"sqlite": "sqlite"} | dict.fromkeys(
    ("postgres", "postgresql", "postgresql+psycopg"), "postgresql+psycopg"
)
# Also without its slashes, or of a database that is not known here: whatever names a user.
URL = re.compile(
    r"[\w+]+://|(sqlite|postgres|mysql|mariadb|oracle|mssql|redis)[\w+]*:|[^/\\]*@|\S*:\S*@"
)
SECRET = {"password", "sslpassword"}  # of a URL's query
ENTRY = b'{"op_code":'  # how each line of a journal begins


class Storage:
    """A study's storage, opened: `optuna` is what Optuna calls it, `name` what a message does.

    A path is a journal file, all else the URL of an SQLite or PostgreSQL database. Raises
    InputError, which never holds a password.
    """

    def __init__(self, where: str | Path, seconds: int) -> None:
        self.name, self._secrets = str(where), list[str]()
        self.backend: Journal | Database
        # A URL without its slashes is no path, either: its password would become a folder's name.
        is_url = isinstance(where, str) and bool(URL.match(where))
        url = _url(str(where)) if is_url else None
        if url is not None:
            self.name = _masked(url)
            self._secrets = [x for x in (url.password, *_secret_values(url)) if x]
        with self.errors():
            if url is None:
                self.backend = Journal(Path(where).absolute(), seconds)
            else:
                try:
                    self.backend = self._database(url, seconds)
                except ImportError:
                    how = "its driver is not installed: pip install 'manualnn[sweep]'"
                    raise InputError(f"--storage {self.name}: {how}") from None
                except RuntimeError as error:  # of tables that another version made
                    raise InputError(f"--storage {self.name}: {self._said(error)}") from None
        self.optuna: BaseStorage = get_storage(self.backend)

    def _database(self, url: sqlalchemy.URL, seconds: int) -> "Database":
        local = url.drivername == "sqlite"
        patience = {"timeout": 60} if local else {"connect_timeout": 10}
        engine = {"pool_pre_ping": True, "connect_args": patience}
        attempts = 5
        for attempt in range(attempts):
            try:
                with experimental():
                    return Database(
                        url.render_as_string(hide_password=False),
                        engine,
                        heartbeat_interval=seconds,
                        grace_period=BEATS * seconds,
                        heartbeat_stale_trial_callback=retry(RETRIES),
                    )
            except DBAPIError as error:  # two workers made the tables at the same moment
                made = not isinstance(error, OperationalError) or "already exists" in str(error)
                if not made or attempt == attempts - 1:
                    raise
                time.sleep(0.2)
        raise AssertionError

    def close(self) -> None:
        if isinstance(self.backend, Database):
            self.backend.close()

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Make what goes wrong with a database into an InputError; a journal says it itself."""
        try:
            yield
        except (SQLAlchemyError, StorageInternalError) as error:
            raise InputError(f"--storage {self.name}: {self._said(error)}") from None

    def _said(self, error: BaseException) -> str:
        """What went wrong, in words without a secret."""
        if isinstance(error, StorageInternalError) and error.__cause__:
            error = error.__cause__
        text = str(getattr(error, "orig", None) or error).strip()
        text = " ".join(re.sub(r"\(Background on this error at: \S+\)", "", text).split())
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text


def _url(where: str) -> sqlalchemy.URL:
    """The URL of a database that is known here, with its driver."""
    scheme = where.partition(":")[0]
    if scheme not in DRIVERS:
        known = "a path of a journal file, sqlite:///FILE or postgresql://USER@HOST/DATABASE"
        shown = f"{scheme}://..." if scheme.isalnum() else "URL"
        raise InputError(f"--storage {shown}: unknown; give {known}")
    with suppress(ArgumentError, ValueError):  # whose message may hold the password
        url = sqlalchemy.make_url(where).set(drivername=DRIVERS[scheme])
        # A password that is cut at a sign of its own would be shown as a host or a database.
        cut = where.count("@") != (url.username is not None)
        if scheme == "sqlite" or not cut:
            return url
    raise InputError(
        f"--storage {scheme}://...: not a valid URL of a database; in a password @ is written %40"
    )


def _secret_values(url: sqlalchemy.URL) -> list[str]:
    values = [url.query[key] for key in SECRET if key in url.query]
    return [x for value in values for x in ([value] if isinstance(value, str) else value)]


def _masked(url: sqlalchemy.URL) -> str:
    """The URL for a reader, without its password."""
    shown = url.update_query_dict({key: "***" for key in SECRET if key in url.query})
    return shown.render_as_string(hide_password=True).replace("+psycopg", "", 1)


@contextmanager
def experimental() -> Iterator[None]:
    """Without the warning that heartbeats are an experimental part of Optuna."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        yield


def retry(most: int | None = None) -> Callable[[Study, FrozenTrial], None]:
    """What puts a failed trial's values into the queue again, so many times at most."""
    with experimental():
        return RetryHeartbeatStaleTrialCallback(max_retry=most)


class Database(RDBStorage):
    """A study in a database; one that cannot be used leaves no connection open."""

    def __init__(self, *args: Any, **options: Any) -> None:
        try:
            super().__init__(*args, **options)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the connections; those of which `__init__` has made any."""
        if hasattr(self, "scoped_session"):
            self.scoped_session.remove()
        if hasattr(self, "engine"):
            self.engine.dispose()


class _File(JournalFileBackend):
    """The journal, whose faults are InputErrors."""

    def __init__(self, path: Path) -> None:
        self._path = path
        lock = JournalFileOpenLock(str(path))
        with _faults(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            super().__init__(str(path), lock)
            lock.acquire()
            try:
                self._cut()
            finally:
                lock.release()

    def _cut(self) -> None:
        """Remove an entry that a killed process or a full disk left unfinished at the end; nobody
        was told that it was written, and what is appended to it would be lost. A file that is no
        journal is left as it is, with a ValueError."""
        with self._path.open("rb+") as file:
            content = file.read()
            if not content.startswith(ENTRY[: len(content)]):
                raise ValueError
            whole = content.rfind(b"\n") + 1
            if whole < len(content):
                file.truncate(whole)
                print(f"note: {self._path}: an unfinished entry is cut off", file=sys.stderr)

    def read_logs(self, log_number_from: int) -> Generator[dict[str, Any], None, None]:
        with _faults(self._path):
            yield from super().read_logs(log_number_from)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        with _faults(self._path):
            super().append_logs(logs)


@contextmanager
def _faults(path: Path) -> Iterator[None]:
    """Make what goes wrong with a journal into an InputError."""
    try:
        yield
    except IsADirectoryError:
        what = f"is a folder; give a file in it, as in {path / 'study.journal'}"
        raise InputError(f"--storage {path}: {what}") from None
    except OSError as error:
        raise InputError(f"--storage {path}: {error.strerror or error}") from None
    except RuntimeError:  # another worker took it after 30 seconds
        raise InputError(f"--storage {path}: its lock was taken away") from None
    except ValueError:
        raise InputError(
            f"--storage {path}: not a journal, or a damaged one; remove it, or give another"
        ) from None


class Journal(JournalStorage, BaseHeartbeat):
    """A study in a file, which workers on a shared file system have in common.

    A trial's sign of life is the time of an empty file in a folder beside it. The clock of the file
    system makes it, and that which it is compared with: those of the machines may differ.
    """

    def __init__(self, path: Path, seconds: int) -> None:
        self.heartbeat_interval, self.grace_period = seconds, BEATS * seconds
        self._path, self._alive = path, path.with_name(f"{path.name}.alive")
        super().__init__(_File(path))

    def record_heartbeat(self, trial_id: int) -> None:
        self._touch(str(trial_id))

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Any = None) -> bool:
        changed = super().set_trial_state_values(trial_id, state, values)
        if state.is_finished():
            with suppress(OSError):
                (self._alive / str(trial_id)).unlink()
        return changed

    def _get_stale_trial_ids(self, study_id: int) -> list[int]:
        running = self.get_all_trials(study_id, deepcopy=False, states=(TrialState.RUNNING,))
        if not running:
            return []
        self._touch("now")
        now = self._time("now") or 0.0
        beats = {trial._trial_id: self._time(str(trial._trial_id)) for trial in running}
        return [x for x, beat in beats.items() if beat is None or now - beat > self.grace_period]

    def _touch(self, name: str) -> None:
        with _faults(self._path):
            self._alive.mkdir(exist_ok=True)
            (self._alive / name).touch()

    def _time(self, name: str) -> float | None:
        """When a file was touched; opened, as network file systems keep older times of names."""
        try:
            with (self._alive / name).open("rb") as file:
                return os.fstat(file.fileno()).st_mtime
        except FileNotFoundError:
            return None

    def get_heartbeat_interval(self) -> int:
        return self.heartbeat_interval

    def get_heartbeat_stale_trial_callback(self) -> Callable[[Study, FrozenTrial], None]:
        return retry(RETRIES)


class Heart:
    """A thread that gives a sign of life of each of the `trials`, by id, again and again."""

    def __init__(self, backend: BaseHeartbeat, seconds: float) -> None:
        self.trials: set[int] = set()
        self._backend, self._seconds, self._over = backend, seconds, Event()
        self._thread = Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Heart":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(self._seconds):
            for trial in tuple(self.trials):
                with suppress(InputError, SQLAlchemyError, StorageInternalError):  # the next may
                    self._backend.record_heartbeat(trial)


def is_file_name(text: str) -> bool:
    """Whether a study's name can be that of its folder."""
    return re.fullmatch(r"[\w+=,-][\w.+=, -]*", text) is not None
