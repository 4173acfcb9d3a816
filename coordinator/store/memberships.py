"""Who asked for a certificate, what the authority answered, and the newest list of the certificates that hold."""

import time
from collections.abc import Iterable
from typing import NamedTuple

import sqlalchemy as sa

from offsite.coordinator.store.database import Database
from offsite.coordinator.store.tables import Row, lists, requests
from offsite.protos.errors import RefusedError

KEPT_S = 7 * 86_400.0  # an answer, for one who was killed before it was kept
KEYS = 8  # that one certificate may ask for, of which the authority grants one


class Decision(NamedTuple):
    """What the authority answers to one request."""

    caller: str
    key: str
    certificate: bytes  # PEM; empty where it refuses
    refusal: str


class Memberships(Database):
    """The tables of requests and of lists."""

    def ask(self, caller: str, key: str, request: bytes) -> None:
        """Record a request, once; one that was refused is decided anew. Raises RefusedError for too many keys."""
        this = requests.c.caller == caller, requests.c.key == key
        anew = {"request": request, "at": time.time(), "state": "unsigned", "refusal": ""}
        with self._write() as connection:
            others = sa.select(sa.func.count()).where(requests.c.caller == caller, requests.c.key != key)
            if connection.execute(others).scalar_one() >= KEYS:
                raise RefusedError(f"a certificate was asked for with {KEYS} other keys already; tell the model owner")
            added = self._insert(requests).values(caller=caller, key=key, **anew).on_conflict_do_nothing()
            if not connection.execute(added).rowcount:
                connection.execute(sa.update(requests).where(*this).values(at=anew["at"]))
                connection.execute(sa.update(requests).where(*this, requests.c.state == "refused").values(**anew))

    def asked(self, caller: str, key: str) -> Row:
        """Return a request that was recorded."""
        (row,) = self._all(sa.select(requests).where(requests.c.caller == caller, requests.c.key == key))
        return row

    def unsigned(self, *, most: int) -> list[Row]:
        """Return requests that the authority has not answered, oldest first."""
        return self._all(sa.select(requests).where(requests.c.state == "unsigned").order_by(requests.c.at).limit(most))

    def decide(self, decisions: Iterable[Decision], *, number: int, pem: bytes) -> None:
        """Record what the authority answered, and the list that lets in whom it answered."""
        with self._write() as connection:
            for one in decisions:
                this = requests.c.caller == one.caller, requests.c.key == one.key
                values = {"state": "signed" if one.certificate else "refused", "certificate": one.certificate}
                connection.execute(sa.update(requests).where(*this).values(refusal=one.refusal, **values))
            old = requests.c.at < time.time() - KEPT_S, requests.c.state != "unsigned"
            connection.execute(sa.delete(requests).where(*old))
            self._replace_list(connection, number, pem)

    def list_number(self) -> int:
        """Return the number of the newest list; 0 without one."""
        return int(self._all(sa.select(sa.func.coalesce(sa.func.max(lists.c.number), 0)))[0][0])

    def list_pem(self) -> bytes:
        """Return the newest list, in PEM form; nothing without one."""
        rows = self._all(sa.select(lists.c.pem).order_by(lists.c.number.desc()).limit(1))
        return bytes(rows[0].pem) if rows else b""

    def keep_list(self, number: int, pem: bytes) -> None:
        """Keep a list, unless there is a newer one."""
        with self._write() as connection:
            self._replace_list(connection, number, pem)

    def _replace_list(self, connection: sa.Connection, number: int, pem: bytes) -> None:
        connection.execute(self._insert(lists).values(number=number, pem=pem).on_conflict_do_nothing())
        newest = sa.select(sa.func.max(lists.c.number)).scalar_subquery()
        connection.execute(sa.delete(lists).where(lists.c.number < newest))
