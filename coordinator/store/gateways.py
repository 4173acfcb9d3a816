"""Gateways in the journal: who serves, whether they agree, and which one of them dispatches."""

import time
from typing import NamedTuple

import sqlalchemy as sa

from offsite.coordinator.store.database import Database
from offsite.coordinator.store.tables import Row, gateways, leaders
from offsite.protos.errors import ConflictError

HERE_S = 20.0  # a gateway says every few seconds that it is here
OLD_S = 30 * 24 * 3600.0  # after which one that was not heard is forgotten
ONE = 1  # the row of who dispatches


class Leader(NamedTuple):
    """Which gateway dispatches; the term is another one whenever another gateway has dispatched in between."""

    name: str
    term: int


def mark(name: str) -> bytes:
    """Return what a gateway keeps among the blobs: another one that does not see it there has other blobs."""
    return f"the blobs of gateway {name}\n".encode()


class Gateways(Database):
    """The tables of gateways and of who leads them."""

    def announce(self, name: str, *, policy: str, owner: str, **about: str | float) -> None:
        """Record that a gateway is here; raises ConflictError where one that is here has another policy or key."""
        now = time.time()
        values = {"policy": policy, "owner": owner, "seen_at": now, **about}
        with self._write() as connection:
            row = self._insert(gateways).values(name=name, **values)
            connection.execute(row.on_conflict_do_update(index_elements=["name"], set_=values))
            connection.execute(sa.delete(gateways).where(gateways.c.seen_at < now - OLD_S))
            others = sa.select(gateways).where(gateways.c.name != name, gateways.c.seen_at >= now - HERE_S)
            for other in connection.execute(others):
                if other.owner != owner:
                    raise ConflictError(
                        f"gateway {other.name} at {other.address} works on this journal with another owner's key; "
                        "give both kits of the same authority"
                    )
                if other.policy != policy:
                    raise ConflictError(
                        f"gateway {other.name} at {other.address} works on this journal under another owner's policy; "
                        "start all with the same --policy: to change it, stop all of them first"
                    )

    def leave(self, name: str) -> None:
        """Record that a gateway is here no longer."""
        with self._write() as connection:
            connection.execute(sa.update(gateways).where(gateways.c.name == name).values(seen_at=0.0))

    def gateways(self, *, within_s: float = HERE_S) -> list[Row]:
        """Return the gateways that are here, or were heard within some time, by name."""
        here = gateways.c.seen_at >= time.time() - within_s
        return self._all(sa.select(gateways).where(here).order_by(gateways.c.name))

    def lead(self, name: str) -> Leader:
        """Record that a gateway dispatches from now on; a new term begins unless it was the last that did."""
        with self._write() as connection:
            first = self._insert(leaders).values(id=ONE, name=name, term=1)
            other = {"name": name, "term": leaders.c.term + 1}
            connection.execute(
                first.on_conflict_do_update(index_elements=["id"], set_=other, where=leaders.c.name != name)
            )
            row = connection.execute(sa.select(leaders.c.name, leaders.c.term)).one()
        return Leader(row.name, row.term)

    def leader(self) -> Leader | None:
        """Return who dispatches, or did last; None before anybody has."""
        rows = self._all(sa.select(leaders.c.name, leaders.c.term))
        return Leader(rows[0].name, rows[0].term) if rows else None
