"""The journal in a database of PostgreSQL, or in one of its schemas."""

import json
import re
import secrets
import threading
from contextlib import closing, suppress
from dataclasses import dataclass, field
from typing import Any

import psycopg
import sqlalchemy as sa
from psycopg.conninfo import conninfo_to_dict
from psycopg.types.json import set_json_dumps
from psycopg.types.string import StrDumper
from sqlalchemy.dialects.postgresql import Insert, insert

from offsite.coordinator.store.database import Unwritable
from offsite.protos.documents import plain
from offsite.protos.errors import InputError, MismatchError, OffsiteError

BEAT_S = 0.5  # after which a watch that is closed ends
AGAIN_S = 0.5  # between two tries to reach a server that is away

# Whatever the URL does not say: a server that does not answer is noticed within a minute.
PARAMETERS = {"connect_timeout": "10", "application_name": "offsite"}
PARAMETERS |= {
    "keepalives_idle": "30",
    "keepalives_interval": "10",
    "keepalives_count": "3",
    "tcp_user_timeout": "60000",
}
# The server notices in the same time that a coordinator is gone, and lets go of what it held.
SETTINGS = """
SET tcp_keepalives_idle = 30; SET tcp_keepalives_interval = 10; SET tcp_keepalives_count = 3;
SET idle_in_transaction_session_timeout = '60s'; SET lock_timeout = '30s';
SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off'
"""
# SQLite lets one process write at a time, and so does this: numbers of events are in the order of commits, so that who
# reads on from a number misses none; no transaction sees half of another; and there are no deadlocks. The locks are of
# a schema, so that several coordinators can share a database. What is notified is delivered at the commit.
BEGIN = sa.text("""
SELECT pg_advisory_xact_lock(hashtextextended('offsite writes ' || current_schema(), 0)),
       pg_notify('offsite_' || md5(current_schema()), '')
""")
LISTEN = """DO $$ BEGIN EXECUTE format('LISTEN %I', 'offsite_' || md5(current_schema())); END $$"""
# Of the session that holds the journal, both ends notice within some ten seconds that the other is gone.
HOLDING = {
    "keepalives_idle": "4",
    "keepalives_interval": "2",
    "keepalives_count": "3",
    "tcp_user_timeout": "10000",
    "connect_timeout": "5",
}
HOLD_SETTINGS = (
    "SET tcp_keepalives_idle = 4; SET tcp_keepalives_interval = 2; SET tcp_keepalives_count = 3",
    # A session of this process that the server has not yet found dead.
    "SELECT pg_terminate_backend(pid, 2000) FROM pg_stat_activity"
    " WHERE application_name = current_setting('application_name') AND pid <> pg_backend_pid()",
)
HOLD = "SELECT pg_try_advisory_lock(hashtextextended('offsite coordinator ' || current_schema(), 0))"
RENUMBER = "SELECT setval(pg_get_serial_sequence('events', 'seq'), max(seq)) FROM events HAVING max(seq) > 0"
ABOUT = "SELECT current_setting('server_encoding'), current_schema() IS NOT NULL"

DAMAGED = ("XX001", "XX002", "42P01", "42703")  # a page or an index; a table or a column that is gone
HINDERED = {  # by the beginning of the SQLSTATE
    "53100": "the server's disk is full; free some space there",
    "53": "the server has no room for more (connections or memory); give it more, or end what else uses it",
    "55P03": "another process holds it; end that",
    "42501": "the role may not do this there; give it the rights to create and change tables in the schema",
    "25006": "it may only be read; name the primary server and not a standby",
    "25P03": "a transaction stood still for a minute; look whether this machine did",
    "57014": "the server broke off a query; see its statement_timeout",
    "57P": "the server stops or starts; it is waited for",
    "58": "the server's disk fails; look at it",
    "08": "the connection broke; look whether the server is up",
}
REFUSED = {  # where a connection is not made there is no SQLSTATE, and these are what English servers say
    "password authentication failed": "the server refuses the password or the role of the URL",
    "no password supplied": "the server asks for a password; write it into the URL, or into ~/.pgpass",
    "pg_hba.conf": "the server lets nobody in from here with this role; see its pg_hba.conf, and sslmode",
    'database ".*" does not exist': "the server has no such database; make it with `createdb`, or name another",
    'role ".*" does not exist': "the server does not know the role of the URL",
    "too many": "the server has no connection left; raise its max_connections, or end what else uses it",
    "certificate": "the server's certificate is not the one that is expected; see sslmode and sslrootcert",
    "SSL": "the server and this end do not agree on TLS; see sslmode",
}


@dataclass(frozen=True)
class Postgresql:
    """A database, by a URL that libpq reads; `where` is what may be shown of it."""

    where: str
    url: str = field(repr=False)

    def connect(self, *queries: str, **more: str) -> psycopg.Connection[Any]:
        """Return a new connection after some queries; raises InputError for no URL, and psycopg's errors."""
        try:
            parameters = conninfo_to_dict(self.url)
        except psycopg.ProgrammingError:
            parameters = {"host": "@"}
        if any("@" in str(parameters.get(name)) for name in ("host", "port", "dbname")):  # of a password, most likely
            raise InputError(
                f"{self.where}: not a URL of PostgreSQL, as in postgresql://role:password@host:5432/database; "
                "in a password, write @ as %40, / as %2F, : as %3A, ? as %3F and % as %25"
            )
        options: dict[str, Any] = PARAMETERS | parameters | {"client_encoding": "utf8"} | more
        connection = psycopg.connect(**options, autocommit=True)
        try:
            for query in (SETTINGS, *queries):
                connection.execute(query)
            connection.adapters.register_dumper(str, _Text)
            set_json_dumps(_json, connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def engine(self) -> sa.Engine:
        """Return what connects to the database, which must be there, and hold texts of any language."""
        with closing(self.connect()) as connection:
            encoding, has_schema = connection.execute(ABOUT).fetchone() or ("", False)
        if encoding != "UTF8":
            raise InputError(
                f"{self.where}: the database is encoded in {encoding}; make one with `createdb --encoding UTF8`"
            )
        if not has_schema:
            raise InputError(f"{self.where}: the search path names no schema that is there; make it (CREATE SCHEMA)")
        return sa.create_engine(
            "postgresql+psycopg://",
            creator=self._connection,
            pool_pre_ping=True,  # after a restart of the server no connection of before is used
            isolation_level="READ COMMITTED",  # so that each statement sees what was committed before the lock
            execution_options={"preserve_rowcount": True},
        )

    def _connection(self) -> psycopg.Connection[Any]:
        connection = self.connect()
        connection.autocommit = False
        return connection

    def insert(self, table: sa.Table) -> Insert:
        """Return an insert into a table."""
        return insert(table)

    def begin(self, connection: sa.Connection) -> None:
        """Wait for the transaction that writes now, and tell watchers at the commit."""
        connection.execute(BEGIN)

    def freeze(self, connection: sa.Connection) -> None:
        """Have the transaction read what was there at its first look."""
        connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")

    def renumber(self, connection: sa.Connection) -> None:
        """Set what numbers events to the largest number."""
        connection.exec_driver_sql(RENUMBER)

    def check(self, connection: sa.Connection) -> None:
        """Nothing is read: the server looks after its files."""

    def words(self, error: object) -> OffsiteError | None:
        """Turn what the server says into a sentence that names the database and what to do."""
        if not isinstance(error, psycopg.Error):
            return None
        state, message = error.sqlstate or "", str(error)
        if state in DAMAGED:
            return MismatchError(
                f"{self.where}: the journal is damaged ({plain(message, most=100)}); restore a backup of the database, "
                "or begin anew with an empty one and another --home"
            )
        what = next((what for start, what in HINDERED.items() if state.startswith(start)), None)
        if what is None and not state and isinstance(error, psycopg.OperationalError | psycopg.InterfaceError):
            what = next((what for part, what in REFUSED.items() if re.search(part, message)), None)
            what = what or f"the server cannot be reached ({plain(message, most=300)}); look whether it is up"
        return Unwritable(f"{self.where}: {what}") if what else None

    def watch(self) -> "Watch":
        """Listen to what is notified at each commit."""
        return Watch(self)

    def hold(self) -> "Hold":
        """Return what locks the journal for a session."""
        return Hold(self)


class Watch:
    """Listens on a connection of its own, in a thread of its own: a server that is away makes nobody wait.

    When the connection breaks, and when it is there again, the database may have changed.
    """

    def __init__(self, dialect: Postgresql) -> None:
        self._dialect = dialect
        self._news, self._closed = threading.Event(), threading.Event()
        threading.Thread(
            target=self._follow, args=(dialect.connect(LISTEN),), daemon=True, name="journal watch"
        ).start()

    def changed(self) -> bool:
        """Tell whether anything was committed since the last look, or may have been."""
        news = self._news.is_set()
        self._news.clear()
        return news

    def close(self) -> None:
        """Listen no more."""
        self._closed.set()

    def _follow(self, connection: psycopg.Connection[Any] | None) -> None:
        while connection:
            with closing(connection), suppress(psycopg.Error):  # whoever reads the journal hears what is wrong
                while not self._closed.is_set():
                    for _ in connection.notifies(timeout=BEAT_S):
                        self._news.set()
            connection = self._again()

    def _again(self) -> psycopg.Connection[Any] | None:
        """Listen again, once the server is there again; None when closed meanwhile."""
        self._news.set()
        while not self._closed.wait(AGAIN_S):
            with suppress(psycopg.Error):
                connection = self._dialect.connect(LISTEN)
                self._news.set()
                return connection
        return None


class Hold:
    """A lock that the server lets go of once it has noticed that this session is over."""

    def __init__(self, dialect: Postgresql) -> None:
        self._dialect = dialect
        self._name = f"offsite coordinator {secrets.token_hex(8)}"
        self._connection: psycopg.Connection[Any] | None = None
        self._taken = False

    def take(self) -> bool:
        """Take the lock unless another session has it, and tell whether it is this one's; it goes with the session."""
        try:
            try:
                return self._ask()
            except psycopg.Error:
                if self._connection is None:
                    raise
                self.close()  # the session is over; of another one it can be had
                return self._ask()
        except psycopg.Error as error:
            self.close()
            raise self._dialect.words(error) or error from None

    def _ask(self) -> bool:
        if self._connection is None:
            about = {**HOLDING, "application_name": self._name}
            self._connection = self._dialect.connect(*HOLD_SETTINGS, **about)
        (answer,) = self._connection.execute("SELECT true" if self._taken else HOLD).fetchone() or (False,)
        self._taken = bool(answer)
        return self._taken

    def close(self) -> None:
        """Let go of it."""
        if self._connection is not None:
            with suppress(psycopg.Error):
                self._connection.close()
        self._connection, self._taken = None, False


class _Text(StrDumper):
    """Texts without NUL, which PostgreSQL cannot hold: no site or person can make a write fail by it."""

    def dump(self, obj: str) -> Any:
        """Return a text's bytes."""
        return super().dump(obj.replace("\0", " "))


def _json(value: Any) -> str:
    r"""Write JSON without \u0000, which PostgreSQL keeps but cannot look into."""
    return re.sub(r"(?<!\\)((?:\\\\)*)\\u0000", r"\1 ", json.dumps(value))
