"""Which transaction an event belongs to, and what happens at its end."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from contextvars import Context, copy_context
from typing import Any

from django.db import DEFAULT_DB_ALIAS, transaction
from django.db import connections as databases
from django.utils.connection import ConnectionDoesNotExist

from dispytch_integrations._blocking_handoff import LeftMessage
from dispytch_integrations._blocking_way import Prepared
from dispytch_integrations.django import conf
from dispytch_integrations.django._connections import connections, tell_after_commit
from dispytch_integrations.django.errors import TransactionError

__all__ = ["Waiting", "after_commit", "observers"]


class Waiting:
    """Messages that wait for the end of a transaction.

    `database`: its alias; None: there is none, they were handed over at once. `done`: has it been committed?
    """

    def __init__(self, prepared: Sequence[Prepared], database: str | None) -> None:
        self.prepared = prepared
        self.database = database
        self.done = False
        self._context: Context = copy_context()
        # This thread's: another thread that asks has others.
        self._connection = None if database is None else databases[database]

    def hand_over(self) -> None:
        """The transaction is committed: leave the messages to the event loop. Raises nothing."""
        self.done = True
        waiting, context = self.prepared, self._context
        try:
            while waiting:
                session = connections.reach()
                # Looked up again: between the call and the commit, settings may have changed, or the process have
                # forked. Where another thread has closed the session meanwhile, there is a new one.
                brokers = session.brokers.brokers
                taken = session.handoff.put(
                    [LeftMessage(brokers.get(message.broker, outlet), message, context) for outlet, message in waiting]
                )
                waiting = waiting[taken:]
                if connections.ending:
                    # Nobody comes after us who would wait for it.
                    session.handoff.flush(session.shutdown_timeout)
        except Exception as exc:
            # It is committed: nothing may become of the request but that it succeeds.
            for outlet, message in waiting:
                # A copy: a receiver of an earlier one may be running in the context itself.
                context.copy().run(tell_after_commit, LeftMessage(outlet, message, context), exc)

    @property
    def registered(self) -> bool:
        """Does it still wait in its connection's list of callbacks? Not done and not there: rolled back."""
        if self._connection is None:
            return False
        entries: Iterable[tuple[Any, ...]] = self._connection.run_on_commit
        return any(getattr(entry[1], _OURS, None) is self for entry in entries)


_OURS = "waiting"
"""The attribute by which a callback of ours is known."""

observers: list[list[Waiting]] = []
"""Where tests collect what waits; see `testing`."""


def after_commit(prepared: Sequence[Prepared], using: str | None, require_transaction: bool | None) -> None:
    """Hand messages over when the transaction is committed that `emit_on_commit` means; at once where there is none."""
    database = _database(using)
    required = conf.require_transaction() if require_transaction is None else require_transaction
    if database is None and required:
        named = f" on database {using!r}" if using is not None else ""
        raise TransactionError(
            f"no transaction is open{named}, and one is required: emit inside `with transaction.atomic():`, "
            f"or give require_transaction=False"
        )
    waiting = Waiting(prepared, database)
    for observer in observers:
        observer.append(waiting)
    if database is None:
        waiting.hand_over()
        return

    def hand_over() -> None:
        waiting.hand_over()

    setattr(hand_over, _OURS, waiting)
    # Robust, and a function, which Django names in its log.
    transaction.on_commit(hand_over, using=database, robust=True)
    _put_forward(databases[database])


def _put_forward(connection: Any) -> None:
    """Move the callback that was registered last in front of those of others, behind our own.

    Django drops all callbacks behind one that raises: an event of a committed transaction would be gone without a word.
    """
    if any(getattr(block, "_from_testcase", False) for block in connection.atomic_blocks):
        return  # captureOnCommitCallbacks knows what is new by its place; in a TestCase there is no commit.
    callbacks: list[tuple[Any, ...]] = connection.run_on_commit
    newest = callbacks.pop()
    # By halves: ours stand in front, and an import may have thousands of either kind.
    callbacks.insert(bisect_left(callbacks, True, key=lambda entry: not hasattr(entry[1], _OURS)), newest)


def _database(using: str | None) -> str | None:
    """The alias of the database whose transaction is meant; None: none is open. Raises TransactionError."""
    open_ones = _open_transactions()
    if using is None:
        if len(open_ones) > 1:
            listed = " and ".join(repr(alias) for alias in open_ones)
            raise TransactionError(
                f"transactions are open on the databases {listed}, and the event can wait for one of them: "
                f"write using={open_ones[0]!r}"
            )
        if open_ones:
            return open_ones[0]
        for connection in databases.all(initialized_only=True):
            if connection.connection is not None and not connection.autocommit:
                raise _by_hand(connection.alias)
        return None
    try:
        connection = databases[using]
    except ConnectionDoesNotExist:
        known = ", ".join(repr(alias) for alias in databases)
        raise TransactionError(
            f"there is no database {using!r} (using= is a database's alias: {known}); "
            f"a broker is chosen by __broker__ on the event's class, or by get_emitter({using!r})"
        ) from None
    if using in open_ones or connection.in_atomic_block:
        return using
    if open_ones:
        listed = " and ".join(repr(alias) for alias in open_ones)
        raise TransactionError(
            f"no transaction is open on database {using!r}, but on {listed}: the event would go out at once; "
            f"write using={open_ones[0]!r}, or open one with transaction.atomic(using={using!r})"
        )
    if _manual(connection):
        raise _by_hand(using)
    return None


def _by_hand(alias: str) -> TransactionError:
    return TransactionError(
        f"database {alias!r} is committed by hand (autocommit is off), and Django tells nobody when: emit inside "
        f"`with transaction.atomic(using={alias!r}):`, or call emit() after the commit"
    )


def _open_transactions() -> list[str]:
    """Databases of this thread with a transaction open, which the program opened and not Django's TestCase.

    TestCase opens one on every database; where it alone has, the event belongs to its first, so that
    captureOnCommitCallbacks sees it.
    """
    opened = [connection for connection in databases.all(initialized_only=True) if connection.in_atomic_block]
    own = [
        connection.alias
        for connection in opened
        if any(not getattr(block, "_from_testcase", False) for block in connection.atomic_blocks)
    ]
    if own or not opened:
        return own
    aliases = [connection.alias for connection in opened]
    return [DEFAULT_DB_ALIAS if DEFAULT_DB_ALIAS in aliases else aliases[0]]


def _manual(connection: Any) -> bool:
    """Does the program commit by itself? Django then refuses on_commit outside of atomic()."""
    if connection.connection is None:
        return not connection.settings_dict["AUTOCOMMIT"]
    return not connection.autocommit
