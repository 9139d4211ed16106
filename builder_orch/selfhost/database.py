"""An SQL database, opened the way the platform needs it; SQLite by default.

Writers on SQLite take the write lock when they begin (BEGIN IMMEDIATE), so that two of them queue
instead of failing half-way. Readers do not wait: the journal is a write-ahead log.
"""

import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from time import time as wall_clock
from typing import Final

from sqlalchemy import Engine, create_engine, event, make_url, select
from sqlalchemy.engine import Connection
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from builder_orch.errors import LocalDiskFull, UsageFailure
from builder_orch.selfhost.rows import Row

BUSY_S: Final = 10.0
"""How long a writer waits for another one."""


class Code(StrEnum):
    """The codes of errors, as the API writes them."""

    UNAUTHORIZED = "UNAUTHORIZED"
    FORBIDDEN = "FORBIDDEN"
    NOT_FOUND = "NOT_FOUND"
    INVALID = "INVALID"


class Refused(Exception):
    """A request that a rule of the platform forbids; the message is for the one who asked."""

    def __init__(self, code: Code, message: str) -> None:
        super().__init__(message)
        self.code = code


class Database:
    """Short transactions on one database. `url` is SQLAlchemy's; `clock` gives Unix seconds."""

    def __init__(self, url: str, *, clock: Callable[[], float] = wall_clock) -> None:
        self._clock = clock
        self._engine = _open(url)
        self._reading = self._engine.execution_options(reading=True)
        Row.metadata.create_all(self._engine)

    def close(self) -> None:
        """Let the database go."""
        self._engine.dispose()

    def ping(self) -> None:
        """Raise whatever keeps the database from answering."""
        with self._read() as session:
            session.execute(select(1))

    @contextmanager
    def _write(self) -> Iterator[Session]:
        with Session(self._engine, expire_on_commit=False) as session, session.begin():
            yield session

    @contextmanager
    def _read(self) -> Iterator[Session]:
        with Session(self._reading, expire_on_commit=False) as session, session.begin():
            yield session


def is_full(error: BaseException) -> bool:
    """Whether a database failed for want of room on its disk."""
    return isinstance(error, DBAPIError) and "disk is full" in str(error.orig)


@contextmanager
def database_failures(path: Path) -> Iterator[None]:
    """Translate what a database in a file refuses into failures with a next step."""
    try:
        yield
    except DBAPIError as error:
        if is_full(error):
            raise LocalDiskFull(
                f"no room for the database in {path.parent}", hint="free some space there"
            ) from error
        raise UsageFailure(
            f"the database {path} cannot be used: {error.orig}",
            hint="move it away to begin with an empty one",
        ) from error


def new_id(kind: str) -> str:
    """A random id that says what it is of."""
    return f"{kind}_{secrets.token_hex(8)}"


def _open(url: str) -> Engine:
    parsed = make_url(url)
    if parsed.get_backend_name() != "sqlite":
        return create_engine(parsed, pool_pre_ping=True)
    if parsed.database:
        # hashes and a signing key are in there; SQLite gives -wal and -shm the same mode
        Path(parsed.database).touch(mode=0o600)
    engine = create_engine(parsed, connect_args={"timeout": BUSY_S})
    event.listen(engine, "connect", _prepare)
    event.listen(engine, "begin", _begin)
    return engine


def _prepare(connection: DBAPIConnection, _record: object) -> None:
    connection.isolation_level = None  # we say BEGIN ourselves, see _begin
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.close()


def _begin(connection: Connection) -> None:
    reading = connection.get_execution_options().get("reading", False)
    connection.exec_driver_sql("BEGIN" if reading else "BEGIN IMMEDIATE")
