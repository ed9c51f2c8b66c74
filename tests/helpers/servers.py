"""Real servers that hold studies, to be stopped and started: PostgreSQL, Optuna's gRPC proxy before it, and Redis.

They are Debian's (`apt-get install postgresql redis-server`); a test without its server is left out (`services.program`).
PostgreSQL refuses to run as root: there it runs as its own user.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg

from .services import program

__all__ = ["PASSWORD", "Postgres", "Proxy", "Redis", "postgres", "proxy", "redis", "wait_for"]

PASSWORD = "s3cret-of-the-test"
STARTS = """
import sys, optuna
from optuna.storages import get_storage, run_grpc_proxy_server
optuna.logging.set_verbosity(optuna.logging.ERROR)
run_grpc_proxy_server(get_storage(sys.argv[1]), host="127.0.0.1", port=int(sys.argv[2]))
"""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def listening(port: int) -> bool:
    with socket.socket() as tried:
        tried.settimeout(1)
        return tried.connect_ex(("127.0.0.1", port)) == 0


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what} after {seconds} s"
        time.sleep(0.05)


class Postgres:
    """A server of its own on a free port, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        found = program(["initdb"], "postgresql", "/usr/lib/postgresql/*/bin/initdb")
        self._bin, self._data, self._log, self._port = Path(found).parent, folder / "data", folder / "log", free_port()
        self._user: dict[str, Any] = {}
        if os.getuid() == 0:
            user = pwd.getpwnam("postgres")
            os.chown(folder, user.pw_uid, user.pw_gid)
            self._user = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        password = folder / "password"
        password.write_text(PASSWORD)
        password.chmod(0o644)
        self._run("initdb", "-D", self._data, "-U", "ann", "--pwfile", password, "--auth", "scram-sha-256", "-N")

    def url(self, database: str = "postgres") -> str:
        return f"postgresql://ann:{PASSWORD}@127.0.0.1:{self._port}/{database}"

    def fresh(self) -> str:
        """The address of a new, empty database."""
        name = f"sweeps_{secrets.token_hex(4)}"
        with psycopg.connect(self.url(), autocommit=True) as connection:
            connection.execute(f"create database {name}")
        return self.url(name)

    def start(self) -> None:
        options = f"-p {self._port} -c listen_addresses=127.0.0.1 -c unix_socket_directories= -c fsync=off"
        self._run("pg_ctl", "-D", self._data, "-l", self._log, "-w", "-o", options, "start")

    def stop(self) -> None:
        """As a crash does: connections are cut, open transactions are lost."""
        self._run("pg_ctl", "-D", self._data, "-m", "immediate", "-w", "stop")

    def _run(self, program: str, *arguments: str | Path) -> None:
        command = [str(self._bin / program), *map(str, arguments)]
        done = subprocess.run(
            command, capture_output=False, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT, cwd="/", check=False, **self._user
        )  # fmt: skip
        said = self._log.read_text() if self._log.exists() else ""
        assert done.returncode == 0, f"{program} failed: {said}"


class Proxy:
    """Optuna's gRPC server before a database."""

    def __init__(self, database: str) -> None:
        self._database, self._port = database, free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"grpc://127.0.0.1:{self._port}"

    def start(self) -> None:
        database = self._database.replace("postgresql://", "postgresql+psycopg://")
        command = [sys.executable, "-W", "ignore", "-c", STARTS, database, str(self._port)]
        self._process = subprocess.Popen(command)
        wait_for(lambda: listening(self._port), "the proxy does not listen")

    def stop(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()


class Redis:
    """A server of its own that writes down every change at once."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._port = folder, free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://:{PASSWORD}@127.0.0.1:{self._port}/0"

    def start(self) -> None:
        found = program(["redis-server"], "redis-server")
        options = f"--port {self._port} --bind 127.0.0.1 --dir {self._folder} --requirepass {PASSWORD} --appendonly yes"
        command = [found, *options.split(), "--appendfsync", "always", "--save", ""]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        wait_for(lambda: listening(self._port), "Redis does not listen")

    def stop(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()


@contextlib.contextmanager
def redis(folder: Path) -> Iterator[Redis]:
    server = Redis(folder)
    server.start()
    try:
        yield server
    finally:
        server.stop()


@contextlib.contextmanager
def postgres() -> Iterator[Postgres]:
    # Not in pytest's own folder, which the server's user may not enter.
    folder = Path(tempfile.mkdtemp(prefix="mutransfer-postgres-"))
    server = Postgres(folder)
    server.start()
    try:
        yield server
    finally:
        with contextlib.suppress(AssertionError):  # stopped by its test
            server.stop()
        shutil.rmtree(folder)


@contextlib.contextmanager
def proxy(database: str) -> Iterator[Proxy]:
    server = Proxy(database)
    server.start()
    try:
        yield server
    finally:
        server.stop()
