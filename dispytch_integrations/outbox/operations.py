"""What operators do with an outbox, for both command lines: look at it, requeue, discard, prune.

Nothing is changed without `--yes` or a yes on the terminal. What `--json` prints is told by each command's help
(`_cli_options`).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, Literal, Protocol, TypeVar

from dispytch_integrations._cli_options import STATES, selection_of
from dispytch_integrations.errors import ConfigurationError
from dispytch_integrations.outbox.console import age
from dispytch_integrations.outbox.runner import DONE, LEFT, DatabaseAwayError, told
from dispytch_integrations.outbox.store import OutboxStore, Row, Selection, State, Stats

__all__ = ["Screen", "Stores", "aligned", "operate"]

Stores = Mapping[str, Callable[[], OutboxStore]]
"""By name, what makes the store of an outbox."""

_T = TypeVar("_T")
_SHOWN = 20
_LISTED = 50
_QUIET = 60.0
"""Seconds without a heartbeat after which it is said that nobody relays."""

_DONE = {"requeue": "requeued", "discard": "discarded", "prune": "deleted"}


class Screen(Protocol):
    """Where it is shown. `interactive`: is there somebody who can be asked?"""

    interactive: bool

    def say(self, text: str, style: Literal["", "good", "bad", "title"] = "") -> None:
        """Write a line."""
        ...

    def table(self, titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Write a table; a title that begins with ">" is that of numbers."""
        ...

    def confirm(self, question: str) -> bool:
        """Ask."""
        ...


def operate(
    command: str,
    stores: Stores,
    given: Mapping[str, Any],
    screen: Screen,
    *,
    on_end: Callable[[], Awaitable[None]] | None = None,
) -> int:
    """Run `stats`, `list`, `requeue`, `discard` or `prune` with the options of `_cli_options`; return the exit code.

    `on_end`: awaited at the end, to close what is the caller's.

    0: done, or shown; 1: the answer was no. Raises ConfigurationError for options that do not fit and tables that are
    missing, DatabaseAwayError when a database does not answer.
    """
    operation = _Operation(command, given, screen)
    operation.check(stores)
    return asyncio.run(operation.run(stores, on_end))


class _Operation:
    def __init__(self, command: str, given: Mapping[str, Any], screen: Screen) -> None:
        self.command = command
        self.given = given
        self.screen = screen
        self.json = bool(given.get("json"))
        self.selection = selection_of(given)

    def check(self, stores: Stores) -> None:
        """Refuse what nobody can mean, before anything is connected."""
        if self.selection.ids and len(stores) > 1:
            raise ConfigurationError(
                f"--id names a row of one database, and these are {' and '.join(stores)}; write --database ALIAS too"
            )
        if self.command == "prune":
            if self.selection.older_than is None:
                raise ConfigurationError("prune needs an age: write --older-than 7d")
            self.selection = replace(self.selection, states=(State.DEAD, State.SENT))
        elif self.command in ("requeue", "discard"):
            if self.selection == Selection() and not self.given.get("all"):
                raise ConfigurationError(
                    f"nothing is selected: write which events to {self.command} (--key, --id, --event-id, --type, "
                    f"--broker, --destination, --state, --older-than), or --all for all dead ones"
                )
            if not self.selection.states:
                self.selection = replace(self.selection, states=(State.DEAD,))

    async def run(self, stores: Stores, on_end: Callable[[], Awaitable[None]] | None) -> int:
        async with AsyncExitStack() as stack:
            if on_end is not None:
                stack.push_async_callback(on_end)
            opened: dict[str, OutboxStore] = {}
            for name, make in stores.items():
                store = opened[name] = make()
                stack.push_async_callback(store.close)
                await _asked(store, store.open())
            if self.command == "stats":
                return await self._stats(opened)
            if self.command == "list":
                return await self._list(opened)
            return await self._change(opened)

    # -- looking -----------------------------------------------------------------------------------------------------

    async def _stats(self, stores: Mapping[str, OutboxStore]) -> int:
        for name, store in stores.items():
            stats = await _asked(store, store.stats())
            if self.json:
                self._print({"database": name, "address": store.address, "time": _now(), **_stats_fields(stats)})
            else:
                self._show_stats(store, stats)
        return DONE

    def _show_stats(self, store: OutboxStore, stats: Stats) -> None:
        self.screen.say(store.address, "title")
        oldest = f", the oldest for {age(stats.oldest)}" if stats.oldest is not None else ""
        retrying = f", {stats.retrying:,} of them failed before" if stats.retrying else ""
        dead = f", the oldest for {age(stats.oldest_dead)}" if stats.oldest_dead is not None else ""
        self.screen.say(f"  waiting  {stats.waiting:,}{oldest}{retrying}")
        if set(stats.brokers) - {"default"}:
            for alias, count in stats.brokers.items():
                self.screen.say(f"           {count:,} for broker {_clean(alias)!r}")
        self.screen.say(f"  dead     {stats.dead:,}{dead}", "bad" if stats.dead else "")
        if stats.sent:
            self.screen.say(f"  sent     {stats.sent:,}, kept")
        for relay, shards in stats.relays.items():
            self.screen.say(f"  relay    {_clean(relay)}: {shards} shards")
        if stats.relays:
            self.screen.say(f"  renewed  {age(stats.heartbeat)} ago")
        elif stats.heartbeat is None:
            self.screen.say("  relay    none has ever run: start one (the command `relay`)", "bad")
        else:
            quiet = f"none; the last one was seen {age(stats.heartbeat)} ago"
            self.screen.say(f"  relay    {quiet}", "bad" if stats.heartbeat > _QUIET or stats.waiting else "")

    async def _list(self, stores: Mapping[str, OutboxStore]) -> int:
        limit = self.given.get("limit") or _LISTED
        for name, store in stores.items():
            rows = await _asked(store, store.rows(self.selection, limit))
            if self.json:
                for row in rows:
                    self._print({"database": name, **_row_fields(row)})
                continue
            if len(stores) > 1:
                self.screen.say(store.address, "title")
            if not rows:
                self.screen.say("No events." if self.selection == Selection() else "No events are selected.")
                continue
            self._table(rows)
            count = await _asked(store, store.count(self.selection))
            if count > len(rows):
                self.screen.say(f"... and {count - len(rows):,} more: --limit {count}")
        return DONE

    def _table(self, rows: Sequence[Row]) -> None:
        titles = (">id", "state", ">age", ">tries", ">next try", "type", "to", "key", "last error")
        self.screen.table(titles, [_cells(row) for row in rows])

    # -- changing ----------------------------------------------------------------------------------------------------

    async def _change(self, stores: Mapping[str, OutboxStore]) -> int:
        selected: dict[str, int] = {
            name: await _asked(store, store.count(self.selection)) for name, store in stores.items()
        }
        shown = {name: await _asked(store, store.rows(self.selection, _SHOWN)) for name, store in stores.items()}
        total = sum(selected.values())
        if not self.json:
            await self._show(stores, selected, shown)
        agreed = bool(self.given.get("yes")) and total > 0
        if total and not agreed and not self.json and self.screen.interactive:
            agreed = self.screen.confirm(f"{self.command.capitalize()} {_events(total)}?")
            if not agreed:
                self.screen.say("Nothing was changed.")
                return LEFT
        done = {name: await self._do(store) if agreed else 0 for name, store in stores.items()}
        if self.json:
            self._print_changes(stores, selected, shown, done)
        elif agreed:
            changed: int = sum(done.values())
            self.screen.say(f"{_events(changed)} {'was' if changed == 1 else 'were'} {_DONE[self.command]}.", "good")
        elif total:
            self.screen.say(f"Nothing was changed: write --yes to {self.command} {'it' if total == 1 else 'them'}.")
        return DONE

    async def _do(self, store: OutboxStore) -> int:
        change = store.requeue if self.command == "requeue" else store.discard
        return await _asked(store, change(self.selection))

    async def _show(
        self, stores: Mapping[str, OutboxStore], selected: Mapping[str, int], shown: Mapping[str, Sequence[Row]]
    ) -> None:
        for name, store in stores.items():
            count = selected[name]
            where = f" in {store.address}" if len(stores) > 1 else ""
            if not count:
                self.screen.say(f"No events are selected{where}: {await self._why_none(store)}.")
                continue
            self.screen.say(f"{_events(count)} {'is' if count == 1 else 'are'} selected{where}:", "title")
            self._table(shown[name])
            if count > len(shown[name]):
                self.screen.say(f"... and {count - len(shown[name]):,} more.")
        if State.WAITING in self.selection.states and self.command == "discard" and any(selected.values()):
            self.screen.say("They have not been sent; a relay may have some of them in hand, and send those.", "bad")

    async def _why_none(self, store: OutboxStore) -> str:
        """What the same selection would be in the other states."""
        states = " or ".join(state.name.lower() for state in self.selection.states)
        if self.command == "prune":
            return f"none has been {states} for {age(self.selection.older_than)}"
        others: list[str] = []
        for other in State:
            if other not in self.selection.states:
                count = await _asked(store, store.count(replace(self.selection, states=(other,))))
                if count:
                    others.append(f"{_are(count)} {other.name.lower()}")
        hint = f"; {' and '.join(others)} (--state)" if others else ""
        rest = await _asked(store, store.count(Selection(states=self.selection.states)))
        if rest:
            hint += f"; {rest:,} other {'event is' if rest == 1 else 'events are'} {states}"
        return f"none is {states}{hint}"

    def _print_changes(
        self,
        stores: Mapping[str, OutboxStore],
        selected: Mapping[str, int],
        shown: Mapping[str, Sequence[Row]],
        done: Mapping[str, int],
    ) -> None:
        for name, store in stores.items():
            self._print(
                {
                    "database": name,
                    "address": store.address,
                    "operation": self.command,
                    "selected": selected[name],
                    "done": done[name],
                    "dry_run": not self.given.get("yes"),
                    "rows": [_row_fields(row) for row in shown[name]],
                }
            )

    def _print(self, fields: Mapping[str, Any]) -> None:
        self.screen.say(json.dumps(fields))


async def _asked(store: OutboxStore, answer: Awaitable[_T]) -> _T:
    """What the database answers. Raises DatabaseAwayError where it does not."""
    try:
        return await answer
    except ConfigurationError:
        raise
    except Exception as exc:
        raise DatabaseAwayError(f"{store.address} does not answer: {told(exc)}") from exc


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _stats_fields(stats: Stats) -> dict[str, Any]:
    return {
        "waiting": stats.waiting,
        "retrying": stats.retrying,
        "dead": stats.dead,
        "sent": stats.sent,
        "oldest_seconds": stats.oldest,
        "oldest_dead_seconds": stats.oldest_dead,
        "brokers": stats.brokers,
        "relays": stats.relays,
        "heartbeat_seconds": stats.heartbeat,
    }


def _row_fields(row: Row) -> dict[str, Any]:
    return {
        "id": row.id,
        "event_id": row.event_id,
        "type": row.type,
        "broker": row.broker,
        "destination": row.destination,
        "key": row.ordering_key,
        "state": STATES[row.state],
        "attempts": row.attempts,
        "age_seconds": row.age,
        "next_try_seconds": row.next_try,
        "last_error": row.last_error,
        "size": row.size,
    }


def _cells(row: Row) -> tuple[str, ...]:
    to = row.destination if row.broker == "default" else f"{row.broker}: {row.destination}"
    return (
        str(row.id),
        STATES[row.state],
        age(row.age),
        str(row.attempts or ""),
        age(row.next_try) if row.next_try is not None else "",
        _clean(row.type),
        _clean(to),
        _clean(row.ordering_key or ""),
        _clean(row.last_error or ""),
    )


def _clean(text: str) -> str:
    """On one line, and nothing that a terminal would obey."""
    return "".join(character if character.isprintable() else " " for character in text)


def _are(count: int) -> str:
    return f"{count:,} {'is' if count == 1 else 'are'}"


def _events(count: int) -> str:
    return f"{count:,} event{'' if count == 1 else 's'}"


def aligned(titles: Sequence[str], rows: Sequence[Sequence[str]], room: int | None = None) -> str:
    """A table as text: two spaces between the columns, numbers to the right.

    `room`: columns of the terminal: what is empty throughout is left out, and lines are cut, that of a single row
    excepted; None: elsewhere.
    """
    if room is not None:
        columns = [index for index in range(len(titles)) if any(row[index] for row in rows)]
        titles, rows = [titles[index] for index in columns], [[row[index] for index in columns] for row in rows]
    heads = [title.lstrip(">") for title in titles]
    widths = [max(len(row[index]) for row in (heads, *rows)) for index in range(len(heads))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.rjust(width) if title.startswith(">") else cell.ljust(width)
            for cell, width, title in zip(cells, widths, titles, strict=True)
        ]
        text = "  ".join(padded).rstrip()
        return text if room is None or len(text) <= room or len(rows) == 1 else f"{text[: room - 1]}…"

    return "\n".join(line(cells) for cells in (heads, *rows))
