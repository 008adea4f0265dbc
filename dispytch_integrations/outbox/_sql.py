"""The outbox's SQL, for PostgreSQL, MySQL, MariaDB and SQLite: one text for Django and SQLAlchemy.

Parameters are written `:name`. Lists of whole numbers are one parameter on PostgreSQL (an array) and SQLite (JSON), so
that the text stays the same, and written out on MySQL.

MySQL and MariaDB lock what they pass: a DELETE that reads a small table from end to end waits for the rows of every
transaction that is open. So rows are looked up by their keys, one by one, by a join. They compare texts without case.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal, Protocol

from dispytch_integrations.errors import ConfigurationError
from dispytch_integrations.outbox.record import SHARDS, Record
from dispytch_integrations.outbox.store import (
    Failure,
    Fetched,
    HeldUp,
    Lease,
    Query,
    Row,
    Selection,
    State,
    Stats,
    Waiting,
)

__all__ = ["CHANNEL", "EVENTS", "INSERTED", "LEASES", "Connection", "Insert", "SQLStore", "require_vendor"]

EVENTS = "dispytch_outbox_event"
"""The table of events."""
LEASES = "dispytch_outbox_shard"
"""The table of shards and their leases."""
CHANNEL = "dispytch_outbox"
"""What PostgreSQL is asked to NOTIFY, without a payload."""

INSERTED = (
    "event_id",
    "type",
    "broker",
    "destination",
    "ordering_key",
    "headers",
    "properties",
    "payload",
    "content_type",
    "format",
    "lane",
    "shard",
    "created_ms",
)
"""The columns that are written at the emit; the others start at 0 or NULL."""
_STARTING = ("state", "state_ms", "attempts", "next_try_ms")
_READ = ", ".join((*INSERTED, "id", "attempts", "next_try_ms"))
_CHUNK = 500
"""Rows of one INSERT, ids of one list that is written out."""
_SLOW, _LOOK_AGAIN = 0.1, 60.0
"""Seconds that reading a batch takes when the database does not know how many rows there are; and until it is told so
again."""

_NOW: Mapping[str, str] = {
    "postgresql": "cast(extract(epoch from clock_timestamp()) * 1000 as bigint)",
    "mysql": "(timestampdiff(microsecond, '1970-01-01', utc_timestamp(6)) div 1000)",
    "sqlite": "cast((julianday('now') - 2440587.5) * 86400000 as integer)",
}
"""The database's time, milliseconds since 1970."""
_IGNORE: Mapping[str, str] = {
    "postgresql": "on conflict (event_id) do nothing",
    # Not INSERT IGNORE, which cuts off what is too long.
    "mysql": "on duplicate key update event_id = event_id",
    "sqlite": "on conflict (event_id) do nothing",
}


class Connection(Protocol):
    """What the SQL is run on: a connection of Django or SQLAlchemy that commits each statement."""

    def query(self, sql: str, parameters: Mapping[str, Any]) -> Sequence[Sequence[Any]]:
        """The rows of a SELECT."""
        ...

    def run(self, sql: str, parameters: Mapping[str, Any]) -> int:
        """How many rows an UPDATE, INSERT or DELETE touched."""
        ...


def require_vendor(vendor: str) -> str:
    """The dialect of SQL for a database. Raises ConfigurationError for one that the outbox does not know."""
    known = {"postgresql": "postgresql", "mysql": "mysql", "mariadb": "mysql", "sqlite": "sqlite"}
    if vendor not in known:
        raise ConfigurationError(
            f"the outbox needs PostgreSQL, MySQL, MariaDB or SQLite, and this database is {vendor}: its relays could "
            f"not lease; write a store of your own (dispytch_integrations.outbox.store)"
        )
    return known[vendor]


class Insert:
    """Stores records: the statements of one INSERT, and their parameters. An event id that is there stays as it is.

    `notify`: let PostgreSQL wake the relays at the commit. Raises ConfigurationError where there is no NOTIFY.
    """

    def __init__(self, vendor: str, events: str = EVENTS, *, notify: bool = False) -> None:
        self._vendor = require_vendor(vendor)
        if notify and self._vendor != "postgresql":
            raise ConfigurationError(f"notify=True is PostgreSQL's NOTIFY, and this database is {vendor}; leave it out")
        self.table = events
        self._notify = notify
        self._texts: dict[int, str] = {}

    def __call__(self, records: Sequence[Record]) -> list[tuple[str, dict[str, Any]]]:
        """Texts and parameters, one for each 500 records."""
        made = [self._statement(records[start : start + _CHUNK]) for start in range(0, len(records), _CHUNK)]
        if self._notify:
            made.append((f"notify {CHANNEL}", {}))
        return made

    def _statement(self, records: Sequence[Record]) -> tuple[str, dict[str, Any]]:
        parameters = {
            f"{column}_{number}": getattr(record, column)
            for number, record in enumerate(records)
            for column in INSERTED
        }
        return self._text(len(records)), parameters

    def _text(self, count: int) -> str:
        text = self._texts.get(count)
        if text is None:
            zeros = ", 0" * len(_STARTING)
            rows = ", ".join(
                "(" + ", ".join(f":{column}_{number}" for column in INSERTED) + zeros + ")" for number in range(count)
            )
            columns = ", ".join((*INSERTED, *_STARTING))
            text = f"insert into {self.table} ({columns}) values {rows} {_IGNORE[self._vendor]}"  # noqa: S608
            if len(self._texts) < 64:
                self._texts[count] = text
        return text


class SQLStore:
    """A store in one of the databases named above, on a connection that the framework brings.

    Synchronous; `run` is called by the framework's store, which brings the thread or the event loop.
    `events`, `shards`: the tables' names, quoted, with their schema if they have one.
    """

    def __init__(self, vendor: str, events: str = EVENTS, shards: str = LEASES) -> None:
        self._vendor = require_vendor(vendor)
        self._events = events
        self._shards = shards
        self._now = _NOW[self._vendor]
        self._next_look = 0.0

    def check_writable(self, on: Connection) -> None:
        """Raise ConfigurationError on a replica: leases are kept on the primary."""
        read_only = {
            "postgresql": "select case when pg_is_in_recovery() then 1 else 0 end",
            "mysql": "select @@global.read_only",
        }
        sql = read_only.get(self._vendor)
        if sql is not None and int(on.query(sql, {})[0][0]):
            raise ConfigurationError(
                "this database is a replica or read-only, and the outbox is written and leased on the primary; give "
                "the relay the primary's address"
            )

    # -- rows ----------------------------------------------------------------------------------------------------

    def fetch(self, on: Connection, query: Query) -> Fetched:
        """As OutboxStore.fetch."""
        parameters: dict[str, Any] = {"format": query.format, "limit": query.limit}
        # With `state = 0` the primary key's index has the same order, and leads through all that is kept.
        where = ["state <= 0", "format <= :format", self._brokers(query.brokers, parameters)]
        # Without a key nothing waits behind it, so it need not be read to know that.
        where.append(f"(ordering_key is not null or next_try_ms <= {self._now})")
        if len(query.shards) < SHARDS:
            where.append(self._in("shard", query.shards, parameters, "shards"))
        if query.not_ids:
            where.append(self._not_in("id", query.not_ids, parameters, "not_ids"))
        if query.not_lanes:
            where.append(self._not_in("lane", query.not_lanes, parameters, "not_lanes"))
        started = time.monotonic()
        rows = on.query(
            f"select {_READ}, {self._now} from {self._events} where {' and '.join(where)} "  # noqa: S608
            f"order by state, id limit :limit",
            parameters,
        )
        if not rows:
            return Fetched([], 0)
        if len(rows) >= query.limit and time.monotonic() - started > _SLOW:
            self._look_at_table(on)
        return Fetched([_record(row) for row in rows], int(rows[-1][-1]))

    def held_up(self, on: Connection, shards: Sequence[int]) -> HeldUp:
        """As OutboxStore.held_up."""
        parameters: dict[str, Any] = {}
        mine = f" and {self._in('shard', shards, parameters, 'shards')}" if len(shards) < SHARDS else ""
        rows = on.query(
            f"select lane, next_try_ms - {self._now} from {self._events} "  # noqa: S608
            f"where state <= 0 and next_try_ms > {self._now} and ordering_key is not null{mine}",
            parameters,
        )
        if not rows:
            return HeldUp((), None)
        return HeldUp([int(row[0]) for row in rows], max(min(int(row[1]) for row in rows) / 1000, 0.0))

    def _look_at_table(self, on: Connection) -> None:
        """Let PostgreSQL count: a backlog that came before its own first look is sorted whole for each batch."""
        if self._vendor != "postgresql" or time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + _LOOK_AGAIN
        with suppress(Exception):  # Who does not own the table may not; then its autovacuum does, in a minute or two.
            on.run(f"analyze {self._events}", {})

    def settle(
        self, on: Connection, sent: Sequence[int], failed: Sequence[Failure], action: Literal["delete", "keep"]
    ) -> None:
        """As OutboxStore.settle."""
        kept = f"state = {State.SENT:d}, state_ms = {self._now}, last_error = null"
        for ids in self._lists(sent):
            if action == "delete":
                self._delete(on, ids)
            else:
                self._update(on, ids, kept, "state = 0")
        for start in range(0, len(failed), _CHUNK):
            self._note(on, failed[start : start + _CHUNK])

    def _delete(self, on: Connection, ids: Sequence[int], where: str = "1 = 1", **parameters: Any) -> int:
        if self._vendor == "mysql":
            return on.run(f"delete t from {self._found(ids)} where {where}", parameters)
        chosen = self._in("id", ids, parameters, "chosen")
        return on.run(f"delete from {self._events} where {chosen} and {where}", parameters)  # noqa: S608

    def _update(self, on: Connection, ids: Sequence[int], sets: str, where: str, **parameters: Any) -> int:
        if self._vendor == "mysql":
            return on.run(f"update {self._found(ids)} set {sets} where {where}", parameters)  # noqa: S608
        chosen = self._in("id", ids, parameters, "chosen")
        return on.run(f"update {self._events} set {sets} where {chosen} and {where}", parameters)  # noqa: S608

    def _found(self, ids: Sequence[int], columns: Sequence[Mapping[str, str]] = ()) -> str:
        """For MySQL: the rows of these ids, each looked up by its key, so that no other is locked on the way."""
        rows = [{"i": str(int(number)), **(columns[index] if columns else {})} for index, number in enumerate(ids)]
        # The first one names the columns.
        listed = " union all ".join(
            "select " + ", ".join(f"{value} as {name}" if not index else value for name, value in row.items())
            for index, row in enumerate(rows)
        )
        return f"({listed}) l straight_join {self._events} t force index (primary) on t.id = l.i"

    def _note(self, on: Connection, failed: Sequence[Failure]) -> None:
        """Note failures by one statement: thousands of rows may be refused at once."""
        ids = [each.id for each in failed]
        states = [int(State.WAITING if each.delay is not None else State.DEAD) for each in failed]
        delays = [0 if each.delay is None else max(int(each.delay * 1000), 1) for each in failed]
        if self._vendor == "postgresql":
            on.run(
                f"update {self._events} as e set attempts = f.attempts, last_error = f.error, state = f.state, "  # noqa: S608
                f"next_try_ms = {self._now} + f.delay, state_ms = {self._now} from unnest(cast(:ids as bigint[]), "
                f"cast(:attempts as integer[]), cast(:errors as text[]), cast(:states as smallint[]), "
                f"cast(:delays as bigint[])) as f (id, attempts, error, state, delay) "
                f"where e.id = f.id and e.state = 0",
                {
                    "ids": ids,
                    "attempts": [each.attempts for each in failed],
                    "errors": [each.error for each in failed],
                    "states": states,
                    "delays": delays,
                },
            )
            return
        names = {error: f"error_{number}" for number, error in enumerate(dict.fromkeys(each.error for each in failed))}
        parameters: dict[str, Any] = {name: error for error, name in names.items()}
        # Whole numbers of our own, and names of parameters.
        told = [
            {"a": str(int(each.attempts)), "e": f":{names[each.error]}", "s": str(state), "d": str(delay)}
            for each, state, delay in zip(failed, states, delays, strict=True)
        ]
        if self._vendor == "mysql":
            on.run(
                f"update {self._found(ids, told)} set t.attempts = l.a, t.last_error = l.e, t.state = l.s, "  # noqa: S608
                f"t.next_try_ms = {self._now} + l.d, t.state_ms = {self._now} where t.state = 0",
                parameters,
            )
            return
        values = ", ".join(
            f"({number}, {t['a']}, {t['e']}, {t['s']}, {t['d']})" for number, t in zip(ids, told, strict=True)
        )
        on.run(
            f"with l (i, a, e, s, d) as (values {values}) update {self._events} set "  # noqa: S608
            f"(attempts, last_error, state, next_try_ms, state_ms) = "
            f"(select a, e, s, {self._now} + d, {self._now} from l where i = id) "
            f"where id in (select i from l) and state = 0",
            parameters,
        )

    def waiting(self, on: Connection, brokers: Sequence[str], format: int) -> Waiting:
        """As OutboxStore.waiting."""
        parameters: dict[str, Any] = {"format": format}
        rows = on.query(
            f"select {self._exact('broker')}, case when format > :format then 1 else 0 end, count(*) "  # noqa: S608
            f"from {self._events} where state = 0 "
            f"and (format > :format or not {self._brokers(brokers, parameters)}) group by 1, 2",
            parameters,
        )
        unknown: dict[str, int] = {}
        newer = 0
        for broker, is_newer, count in rows:
            if is_newer:
                newer += int(count)
            else:
                unknown[_text(broker)] = int(count)
        return Waiting(unknown, newer)

    # -- leases --------------------------------------------------------------------------------------------------

    def leases(self, on: Connection) -> list[Lease]:
        """As OutboxStore.leases."""
        text = f"select shard, owner, until_ms - {self._now}, wanted_by, wanted_ms - {self._now} from {self._shards}"  # noqa: S608
        rows = on.query(f"{text} order by shard", {})
        if len(rows) < SHARDS:
            self._make_shards(on, {int(row[0]) for row in rows})
            rows = on.query(f"{text} order by shard", {})
        return [Lease(int(row[0]), row[1], int(row[2]) / 1000, row[3], int(row[4]) / 1000) for row in rows]

    def _make_shards(self, on: Connection, there: set[int]) -> None:
        ignore = _IGNORE[self._vendor].replace("event_id", "shard")
        rows = ", ".join(f"({number}, 0, 0)" for number in range(SHARDS) if number not in there)
        on.run(f"insert into {self._shards} (shard, until_ms, wanted_ms) values {rows} {ignore}", {})  # noqa: S608

    def renew(self, on: Connection, relay: str, seconds: float) -> None:
        """As OutboxStore.renew."""
        on.run(
            f"update {self._shards} set until_ms = {self._now} + :lease, heartbeat_ms = {self._now} "  # noqa: S608
            f"where owner = :relay",
            {"lease": int(seconds * 1000), "relay": relay},
        )

    def take(self, on: Connection, relay: str, shards: Sequence[int], seconds: float) -> None:
        """As OutboxStore.take."""
        parameters: dict[str, Any] = {"lease": int(seconds * 1000), "relay": relay}
        on.run(
            f"update {self._shards} set owner = :relay, until_ms = {self._now} + :lease, heartbeat_ms = {self._now}, "  # noqa: S608
            f"wanted_by = null, wanted_ms = 0 "
            f"where {self._in('shard', shards, parameters, 'shards')} and (owner is null or until_ms < {self._now})",
            parameters,
        )

    def want(self, on: Connection, relay: str, shards: Sequence[int], seconds: float) -> None:
        """As OutboxStore.want."""
        parameters: dict[str, Any] = {"lease": int(seconds * 1000), "relay": relay}
        on.run(
            f"update {self._shards} set wanted_by = :relay, wanted_ms = {self._now} + :lease "  # noqa: S608
            f"where {self._in('shard', shards, parameters, 'shards')} "
            f"and (wanted_by is null or wanted_by = :relay or wanted_ms < {self._now})",
            parameters,
        )

    def hand_over(self, on: Connection, relay: str, shards: Sequence[int], to: str | None, seconds: float) -> None:
        """As OutboxStore.hand_over."""
        parameters: dict[str, Any] = {"relay": relay, "next": to, "lease": int(seconds * 1000)}
        until = "0" if to is None else f"{self._now} + :lease"
        if to is None:
            del parameters["lease"]
        on.run(
            f"update {self._shards} set owner = :next, until_ms = {until}, wanted_by = null, wanted_ms = 0 "  # noqa: S608
            f"where {self._in('shard', shards, parameters, 'shards')} and owner = :relay",
            parameters,
        )

    # -- operations ----------------------------------------------------------------------------------------------

    def stats(self, on: Connection) -> Stats:
        """As OutboxStore.stats."""
        counted = on.query(
            f"select state, {self._exact('broker')}, count(*), sum(case when attempts > 0 then 1 else 0 end), "  # noqa: S608
            f"{self._now} - min(created_ms), {self._now} - min(state_ms) from {self._events} group by 1, 2",
            {},
        )
        waiting, dead, sent = (
            [row for row in counted if int(row[0]) == state] for state in (State.WAITING, State.DEAD, State.SENT)
        )
        relays: dict[str, int] = {}
        for owner, count in on.query(
            f"select owner, count(*) from {self._shards} where owner is not null and until_ms >= {self._now} "  # noqa: S608
            f"group by owner order by owner",
            {},
        ):
            relays[owner] = int(count)
        [heartbeat] = on.query(f"select {self._now} - max(heartbeat_ms) from {self._shards}", {})  # noqa: S608
        return Stats(
            waiting=sum(int(row[2]) for row in waiting),
            retrying=sum(int(row[3]) for row in waiting),
            dead=sum(int(row[2]) for row in dead),
            sent=sum(int(row[2]) for row in sent),
            oldest=max((max(int(row[4]) / 1000, 0.0) for row in waiting), default=None),
            oldest_dead=max((max(int(row[5]) / 1000, 0.0) for row in dead), default=None),
            brokers=dict(sorted((_text(row[1]), int(row[2])) for row in waiting)),
            relays=relays,
            heartbeat=None if heartbeat[0] is None else max(int(heartbeat[0]) / 1000, 0.0),
        )

    def rows(self, on: Connection, selection: Selection, limit: int) -> list[Row]:
        """As OutboxStore.rows."""
        where, parameters = self._where(selection)
        rows = on.query(
            f"select id, event_id, type, broker, destination, ordering_key, state, attempts, {self._now} - created_ms, "  # noqa: S608
            f"next_try_ms - {self._now}, last_error, coalesce(length(payload), 0) from {self._events} where {where} "
            f"order by id limit :limit",
            {**parameters, "limit": limit},
        )
        return [
            Row(
                id=int(row[0]),
                event_id=row[1],
                type=row[2],
                broker=row[3],
                destination=row[4],
                ordering_key=row[5],
                state=State(int(row[6])),
                attempts=int(row[7]),
                age=max(int(row[8]) / 1000, 0.0),
                next_try=int(row[9]) / 1000 if int(row[6]) == State.WAITING and int(row[9]) > 0 else None,
                last_error=row[10],
                size=int(row[11]),
            )
            for row in rows
        ]

    def count(self, on: Connection, selection: Selection) -> int:
        """As OutboxStore.count."""
        where, parameters = self._where(selection)
        return int(on.query(f"select count(*) from {self._events} where {where}", parameters)[0][0])  # noqa: S608

    def requeue(self, on: Connection, selection: Selection) -> int:
        """As OutboxStore.requeue."""
        fresh = "state = 0, state_ms = 0, attempts = 0, next_try_ms = 0"
        where, parameters = self._where(selection)
        if self._vendor == "mysql":
            return sum(self._update(on, ids, fresh, where, **parameters) for ids in self._ids(on, where, parameters))
        return on.run(f"update {self._events} set {fresh} where {where}", parameters)  # noqa: S608

    def discard(self, on: Connection, selection: Selection) -> int:
        """As OutboxStore.discard."""
        where, parameters = self._where(selection)
        if self._vendor == "mysql":
            return sum(self._delete(on, ids, where, **parameters) for ids in self._ids(on, where, parameters))
        return on.run(f"delete from {self._events} where {where}", parameters)  # noqa: S608

    def _ids(self, on: Connection, where: str, parameters: dict[str, Any]) -> list[Sequence[int]]:
        """The ids of rows, in pieces; no row is locked."""
        rows = on.query(f"select id from {self._events} where {where}", parameters)  # noqa: S608
        return self._lists([int(row[0]) for row in rows])

    def _where(self, selection: Selection) -> tuple[str, dict[str, Any]]:
        parameters: dict[str, Any] = {}
        where = ["1 = 1"]
        if selection.ids:
            where.append(self._in("id", selection.ids, parameters, "ids"))
        if selection.event_ids:
            names = {f"event_id_{number}": each for number, each in enumerate(selection.event_ids)}
            parameters.update(names)
            where.append(f"event_id in ({', '.join(f':{name}' for name in names)})")
        exact = {
            "ordering_key": selection.key,
            "type": selection.type,
            "broker": selection.broker,
            "destination": selection.destination,
        }
        for column, value in exact.items():
            if value is not None:
                where.append(f"{self._exact(column)} = :{column}")
                parameters[column] = value
        if selection.states:
            where.append(f"state in ({', '.join(str(int(state)) for state in selection.states)})")
        if selection.older_than is not None:
            where.append(f"(case when state = 0 then created_ms else state_ms end) < {self._now} - :older")
            parameters["older"] = int(selection.older_than * 1000)
        return " and ".join(where), parameters

    # -- pieces --------------------------------------------------------------------------------------------------

    def _brokers(self, brokers: Sequence[str], parameters: dict[str, Any]) -> str:
        if not brokers:
            return "(1 = 0)"
        names = {f"broker_{number}": each for number, each in enumerate(brokers)}
        parameters.update(names)
        return f"({self._exact('broker')} in ({', '.join(f':{name}' for name in names)}))"

    def _exact(self, column: str) -> str:
        """A column of text, compared as it is: MySQL's collations know no case, and no spaces at the end."""
        return f"cast({column} as binary)" if self._vendor == "mysql" else column

    def _in(self, column: str, numbers: Sequence[int], parameters: dict[str, Any], name: str) -> str:
        if not numbers:
            return "(1 = 0)"
        if self._vendor == "postgresql":
            parameters[name] = list(numbers)
            return f"{column} = any(cast(:{name} as bigint[]))"
        if self._vendor == "sqlite":
            parameters[name] = json.dumps(list(numbers))
            return f"{column} in (select value from json_each(:{name}))"  # noqa: S608 - names of ours
        return f"{column} in ({_written(numbers)})"

    def _not_in(self, column: str, numbers: Sequence[int], parameters: dict[str, Any], name: str) -> str:
        if self._vendor == "postgresql":
            # A hash in every version; `<> all` is one from PostgreSQL 15 on.
            parameters[name] = list(numbers)
            return f"{column} not in (select unnest(cast(:{name} as bigint[])))"
        if self._vendor == "sqlite":
            parameters[name] = json.dumps(list(numbers))
            return f"{column} not in (select value from json_each(:{name}))"  # noqa: S608
        return f"{column} not in ({_written(numbers)})"

    def _lists(self, numbers: Sequence[int]) -> list[Sequence[int]]:
        if not numbers:
            return []
        if self._vendor == "postgresql":
            return [numbers]
        return [numbers[start : start + _CHUNK] for start in range(0, len(numbers), _CHUNK)]


def _text(value: str | bytes) -> str:
    return value if isinstance(value, str) else bytes(value).decode()


def _written(numbers: Sequence[int]) -> str:
    return ", ".join([str(int(number)) for number in numbers])


def _record(row: Sequence[Any]) -> Record:
    payload = row[7]
    return Record(
        row[0],
        row[1],
        row[2],
        row[3],
        row[4],
        row[5],
        row[6],
        payload if payload is None or payload.__class__ is bytes else bytes(payload),
        row[8],
        row[9],
        row[10],
        row[11],
        row[12],
        row[13],
        row[14],
        row[15],
    )
