"""Open a study's storage by its address (a database, a gRPC proxy, Redis, or one journal file) and lock folders and files.

Locks are kernel locks, which are released when a process ends or is killed: filelock's `FileLock`, and `flock` on the journal
itself. Optuna's own journal locks are files: they outlive a killed process, which blocks others (for half a minute, or forever if
the path is relative), and a Ctrl-C during their release turns into a FileNotFoundError. `flock` works on local disks, and on NFS
and Lustre if they are mounted with locks.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import importlib.util
import json
import os
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import optuna
from filelock import FileLock, Timeout
from optuna.storages import BaseStorage, GrpcStorageProxy, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalRedisBackend

from mutransfer.errors import RequestError, StorageError, describe
from mutransfer.io import masked, naming_the_disk
from mutransfer.run_dir import RunFolder

from ._optuna_internals import CachedStorage, InterruptibleJournalStorage, close_database
from .retry import RetryingStorage, made_by_others

__all__ = ["Journal", "Opened", "naming_the_storage", "only_one", "only_worker", "opened", "own_journal"]

S = TypeVar("S", bound=BaseStorage)


@contextlib.contextmanager
def only_one(folder: RunFolder) -> Iterator[None]:
    """Lock the run folder for this process: a second sweep in it would retry the trials that the first one is running.

    Raises:
        StorageError: another process holds the lock.
    """
    busy = f"another process is at work in {folder.path}: wait for it or use another --out."
    with _held(folder.path / ".lock", busy):
        yield


@contextlib.contextmanager
def only_worker(address: str) -> Iterator[None]:
    """Lock the SQLite file of the URL ``address``: SQLite writers wait for each other, and its locks fail on network disks.

    Raises:
        StorageError: another worker holds the lock, or the file cannot be opened.
    """
    path = urlsplit(address).path.removeprefix("/")
    if not path:  # an in-memory database
        yield
        return
    busy = (
        f"another worker is at work in {address}, but SQLite serves one at a time: use a --storage for several workers, "
        "such as journal:FILE or postgresql://HOST/DATABASE."
    )
    try:
        held = contextlib.ExitStack()
        held.enter_context(_held(Path(f"{path}.lock"), busy))
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise StorageError(f"cannot open the storage {address} ({reason}): check its folder and its address.") from None
    with held:
        yield


@contextlib.contextmanager
def _held(path: Path, busy: str) -> Iterator[None]:
    path.parent.stat()  # some versions of filelock make a missing folder
    # A soft lock, filelock's way on file systems without flock, is a file that outlives a killed process.
    lock = FileLock(path, timeout=0, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        raise StorageError(busy) from None
    try:
        yield
    finally:
        lock.release()


KNOWN = (
    "postgresql://USER@HOST/DATABASE, mysql://…, grpc://HOST:PORT, redis://HOST:PORT/0, journal:FILE, or sqlite:///FILE"
)
DATABASES = ("postgresql", "postgres", "mysql", "mariadb")
PACKAGES = {"sqlalchemy", "psycopg", "psycopg2", "MySQLdb", "pymysql", "mysql", "grpc", "redis"}
ANSWER_WITHIN = 10  # seconds allowed for a connection
SAME_TABLES = (
    0.1,
    0.3,
    1.0,
    3.0,
    None,
)  # seconds after each attempt to create the tables of a new database, which other workers may be creating too
DRIVERS = {
    "psycopg2": "pip install psycopg2-binary, or write postgresql+psycopg://…",
    "psycopg": "pip install 'psycopg[binary]'",
    "MySQLdb": "pip install mysqlclient",
    "pymysql": "pip install pymysql",
    "grpc": "pip install grpcio protobuf",
    "redis": "pip install redis",
}


@dataclass(frozen=True)
class Opened:
    """An open storage.

    Args:
        backend: the storage.
        where: its address, for messages.
        shared: whether other workers may use it at the same time.
        own: whether it is the run folder's journal, which holds one study.
        hurry: limits all further waiting for a server, because the process is about to end.
        close: closes its connections.
    """

    backend: BaseStorage
    where: str
    shared: bool
    own: bool = False
    hurry: Callable[[], None] = lambda: None
    close: Callable[[], None] = lambda: None


def own_journal(folder: RunFolder) -> Opened:
    """Open the journal in a run folder that this process has locked.

    Raises:
        StorageError: the file is not a journal or cannot be read.
    """
    try:
        backend = InterruptibleJournalStorage(Journal(folder.journal))
    except (KeyError, AssertionError, json.JSONDecodeError) as error:
        raise StorageError(f"cannot read the study in {folder.journal} ({error}): name another --out.") from None
    return Opened(backend, str(folder.journal), False, own=True)


@contextlib.contextmanager
def opened(address: str) -> Iterator[Opened]:
    """Open the storage at ``address``; a SQLite file is locked for this process because it serves one worker at a time.

    Raises:
        StorageError: the storage cannot be reached, its driver is missing, the address is invalid, or another worker holds
            the file.
    """
    shared = address.partition(":")[0].partition("+")[0].lower() != "sqlite"
    with contextlib.nullcontext() if shared else only_worker(address):
        storage = _reached(address)
        try:
            yield storage
        finally:
            storage.close()


@contextlib.contextmanager
def naming_the_storage(storage: Opened) -> Iterator[None]:
    """Turn a permanent error of the storage's driver (a full disk, a missing permission) into a `StorageError`."""
    try:
        yield
    except Exception as error:
        kinds = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
        if not isinstance(error, optuna.exceptions.StorageInternalError) and not kinds & PACKAGES:
            raise
        raise StorageError(
            f"the storage {storage.where} failed ({masked(describe(_innermost(error)))}): fix that and run the same command "
            "again; finished trials are kept."
        ) from error


def _reached(address: str) -> Opened:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        try:
            return _open(address)
        except RequestError:
            raise
        except ImportError as error:
            missing = _missing(error)
            raise StorageError(
                f"the storage {masked(address)} needs the Python package {missing}: {DRIVERS.get(missing, 'install it')}."
            ) from None
        except Exception as error:  # any error of its driver
            if isinstance(error, OSError) and error.filename is not None:
                reason, move = os.strerror(error.errno or 0), "check its folder and its address"
            else:
                reason, move = masked(describe(_innermost(error))), "check that it runs and its address"
            raise StorageError(f"cannot open the storage {masked(address)} ({reason}): {move}.") from None


def _open(address: str) -> Opened:
    scheme, colon, rest = address.partition(":")
    kind, server = scheme.partition("+")[0].lower(), rest.startswith("//")
    if colon and kind == "journal" and rest:
        return _journal(Path(rest.removeprefix("//")), address)
    if not colon and address.endswith(".journal"):
        return _journal(Path(address), address)
    if kind == "sqlite":
        return _sqlite(address)
    if kind in DATABASES and server:
        return _retrying(address, lambda: _database(address), close_database)
    if kind in ("redis", "rediss") and server:
        return _retrying(
            address,
            lambda: InterruptibleJournalStorage(JournalRedisBackend(address, prefix="mutransfer")),
            lambda _: None,
        )
    if kind == "grpc" and server:
        return _retrying(address, lambda: _proxy(address), GrpcStorageProxy.close, reopen=True)
    raise StorageError(f"the storage {masked(address)!r} is of an unknown kind: write {KNOWN}.")


def _journal(path: Path, address: str) -> Opened:
    return Opened(InterruptibleJournalStorage(Journal(path)), masked(address), True)


def _sqlite(address: str) -> Opened:
    backend = CachedStorage(RDBStorage(address))
    return Opened(backend, masked(address), False, close=lambda: close_database(backend))


def _retrying(address: str, open_: Callable[[], S], close: Callable[[S], None], *, reopen: bool = False) -> Opened:
    storage = RetryingStorage(open_, address, reopen=reopen)
    return Opened(storage, masked(address), True, hurry=storage.hurry, close=lambda: close(storage.storage))


def _database(address: str) -> CachedStorage:
    _make_tables(address)
    # The pre-ping detects a connection that a server restart has closed; the timeout covers a host that drops packets.
    return CachedStorage(_tables(address, pool_pre_ping=True))


def _make_tables(address: str) -> None:
    """Create the tables of a new database. If several workers do so at once, all but one retry and find the tables."""
    from sqlalchemy.pool import NullPool  # slow to import, and not needed for a journal

    for pause in SAME_TABLES:
        try:
            # Use no pool: the connections of a storage that could not be opened would stay open.
            _tables(address, poolclass=NullPool)
        except Exception as error:
            if pause is None or not made_by_others(error):
                raise
            time.sleep(pause)
        else:
            return


def _tables(address: str, **options: Any) -> RDBStorage:
    within = {} if "connect_timeout" in address else {"connect_timeout": ANSWER_WITHIN}
    return RDBStorage(_with_driver(address), engine_kwargs={**options, "connect_args": within})


def _with_driver(address: str) -> str:
    """Return ``address`` with psycopg as the driver if it is installed and no driver is given: SQLAlchemy's default varies."""
    scheme, _, rest = address.partition("://")
    if scheme in ("postgresql", "postgres"):
        installed = importlib.util.find_spec("psycopg") is not None
        return f"postgresql{'+psycopg' if installed else ''}://{rest}"
    return address


def _proxy(address: str) -> GrpcStorageProxy:
    try:
        found = urlsplit(address)
        host, port = found.hostname, found.port
    except ValueError:
        host = port = None
    if not host or not port:
        raise StorageError(f"the storage {masked(address)!r} has no host and port: write grpc://HOST:PORT.")
    proxy = GrpcStorageProxy(host=host, port=port)
    proxy.wait_server_ready(timeout=ANSWER_WITHIN)
    return proxy


def _missing(error: ImportError) -> str:
    """Return the package that a driver tried to import; Optuna names it only in the cause of its own error."""
    seen: BaseException | None = error
    name = None
    while seen is not None:
        name = getattr(seen, "name", None) or name
        seen = seen.__cause__ or seen.__context__
    return (name or str(error)).partition(".")[0]


def _innermost(error: BaseException) -> BaseException:
    """Return the database driver's own error, which is more specific than the errors that wrap it."""
    if isinstance(error, optuna.exceptions.StorageInternalError) and error.__cause__ is not None:
        error = error.__cause__
    return getattr(error, "orig", None) or error


BLOCK = 65536  # bytes per read when searching backwards for the last newline
FIRST = b'{"op_code":'  # first bytes of a journal, including those written by Optuna itself


class Journal(JournalFileBackend):
    """Journal file at ``path``, created if it does not exist and truncated to its last complete line.

    A process killed during a write, or a full disk, leaves a partial line, and readers fail once another line follows it. The
    write of a partial line was never confirmed, so it can be cut off safely. This is done here and before every append.

    Raises:
        StorageError: the file is not a journal, or its file system has no locks.
        OSError: the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        with self.locked():
            pass

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Append ``logs``, one line each, and return once they are on the disk.

        Raises:
            FileError: the disk is full or cannot be written.
        """
        lines = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs).encode()
        with naming_the_disk(self._file_path), self.locked() as file:
            # Do not undo a failed write here: others may already have read a line that was completely written.
            while lines:
                lines = lines[os.write(file, lines) :]
            os.fsync(file)

    @contextlib.contextmanager
    def locked(self) -> Iterator[int]:
        """Lock the journal for this process, cut off a half-written last line, and yield the file open at its end."""
        # Not a FileLock, which locks a file beside it: the lock must be on the file that is truncated and appended to, by
        # whatever path it is opened, and workers of earlier versions lock it as well. FileLock also polls where flock waits.
        file = os.open(self._file_path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno not in {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS}:
                    raise
                raise StorageError(
                    f"the file system of {self._file_path} has no locks, without which workers would overwrite each other: "
                    "mount it with locks, or name a --storage on a server, such as postgresql://HOST/DATABASE."
                ) from None
            begin = os.pread(file, len(FIRST), 0)
            if not FIRST.startswith(begin):  # do not truncate: it may be an unrelated file
                raise StorageError(f"{self._file_path} is not a study journal: name another --storage or --out.")
            whole = _end_of_last_line(file)
            if whole < os.fstat(file).st_size:
                os.ftruncate(file, whole)
            yield file
        finally:
            os.close(file)  # also releases the lock


def _end_of_last_line(file: int) -> int:
    end = os.fstat(file).st_size
    while end:
        begin = max(0, end - BLOCK)
        newline = os.pread(file, end - begin, begin).rfind(b"\n")
        if newline >= 0:
            return begin + newline + 1
        end = begin
    return 0
