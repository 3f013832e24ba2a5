"""A PostgreSQL server of our own in a temporary folder, for tests and benchmarks."""

import getpass
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PASSWORD = "kept-out-of-sight"


class MissingError(Exception):
    """There is no server to start; the message says why."""


def binaries() -> Path:
    """The folder of initdb and pg_ctl; where there are several versions the newest."""
    if found := shutil.which("pg_ctl"):
        return Path(found).resolve().parent
    places = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda p: float(p.parent.name))
    for place in reversed(places):
        if (place / "initdb").exists() and (place / "pg_ctl").exists():
            return place
    raise MissingError("no PostgreSQL server is installed (initdb, pg_ctl)")


@contextmanager
def server() -> Iterator[str]:
    """The URL of an empty database of a server that ends with the block, and asks for a password.

    The server refuses to run as root: there it runs as the user postgres. Raises MissingError.
    """
    folder, root = Path(tempfile.mkdtemp(prefix="postgres-")), os.geteuid() == 0
    try:
        place, user = binaries(), "postgres" if root else getpass.getuser()
        before = ["runuser", "-u", user, "--"] if root else []
        (folder / "password").write_text(PASSWORD)
        if root:
            if not shutil.which("runuser"):
                raise MissingError("as root, PostgreSQL needs runuser to be started by another")
            try:
                for path in (folder, folder / "password"):
                    shutil.chown(path, user)
            except LookupError:
                raise MissingError("there is no user postgres to start PostgreSQL as") from None
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]

        def call(program: str, *arguments: object) -> None:
            # pg_ctl's server would keep a pipe open, so what is said goes to a file
            said = folder / "said"
            with said.open("w") as file:
                done = subprocess.run(
                    [*before, str(place / program), *map(str, arguments)],
                    stdout=file, stderr=file, stdin=subprocess.DEVNULL, cwd=folder, timeout=60,
                )  # fmt: skip
            if done.returncode:
                raise MissingError(f"{program} failed: {' '.join(said.read_text().split())[-300:]}")

        data = folder / "data"
        call(
            "initdb", "-D", data, "-U", "sweeper", "-A", "scram-sha-256", "--no-sync", "-E", "UTF8",
            f"--pwfile={folder / 'password'}",
        )  # fmt: skip
        settings = f"-F -p {port} -k {folder} -c listen_addresses=127.0.0.1"
        call("pg_ctl", "-D", data, "-w", "-t", "30", "-l", folder / "log", "-o", settings, "start")
        try:
            yield f"postgresql://sweeper:{PASSWORD}@127.0.0.1:{port}/postgres"
        finally:
            call("pg_ctl", "-D", data, "-m", "immediate", "-w", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
