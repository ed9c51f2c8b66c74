"""Which errors of a database driver pass: its server is away for the moment, or others make the same tables."""

from __future__ import annotations

from mutransfer.errors import describe

__all__ = ["made_by_others", "outage"]

# PostgreSQL's classes 08 (connection) and 57P (shutting down, starting up), too many connections; two transactions in each
# other's way, of which one is to be tried again.
SQL_STATES = ("08", "57P", "53300", "40001", "40P01")
# MySQL: cannot connect, gone away, lost in the middle, shutting down, too many connections; deadlock, lock timeout.
MYSQL_CODES = {2002, 2003, 2006, 2013, 2055, 1053, 1040, 1213, 1205}
# A row, a table or a type is there already, of PostgreSQL and of MySQL.
THERE = {"23505", "42P07", "42710", 1050, 1062}


def outage(error: BaseException) -> str | None:
    """Return what to tell a person if ``error`` says that the server does not answer now; None if it says anything else."""
    seen: BaseException | None = error
    while seen is not None:
        if _says_away(seen):
            return describe(getattr(seen, "orig", None) or seen)
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)
    return None


def made_by_others(error: BaseException) -> bool:
    """Return whether ``error``, on opening a database, says that another worker has just made what was to be made."""
    driver = getattr(error, "orig", None)
    return _state(driver) in THERE or next(iter(getattr(driver, "args", ())), None) in THERE


def _says_away(error: BaseException) -> bool:
    # By name: a driver that is not in use is not installed either.
    kinds = {f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in type(error).__mro__}
    if "sqlalchemy.DBAPIError" in kinds:
        return _database_is_away(error)
    if "grpc.RpcError" in kinds:
        # UNKNOWN is how Optuna's proxy passes on that its own database is away.
        code = getattr(error, "code", lambda: None)()
        return getattr(code, "name", "") in {"UNAVAILABLE", "UNKNOWN", "DEADLINE_EXCEEDED", "CANCELLED"}
    return bool(
        kinds & {"redis.ConnectionError", "redis.TimeoutError", "builtins.ConnectionError", "builtins.TimeoutError"}
    )


def _database_is_away(error: BaseException) -> bool:
    if getattr(error, "connection_invalidated", False):
        return True
    driver = getattr(error, "orig", None)
    module = type(driver).__module__.partition(".")[0]
    if module == "sqlite3" or "OperationalError" not in {kind.__name__ for kind in type(driver).__mro__}:
        return False
    state = _state(driver)
    if module in {"psycopg", "psycopg2"}:
        return state is None or str(state).startswith(SQL_STATES)  # without one it has not got as far as a server
    code, *_ = getattr(driver, "args", ()) or (None,)
    return code in MYSQL_CODES


def _state(driver: BaseException | None) -> str | None:
    return getattr(driver, "sqlstate", None) or getattr(driver, "pgcode", None)
