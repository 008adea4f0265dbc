"""Which transaction an event belongs to, and what happens at its end."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from contextvars import Context, copy_context
from typing import Any, ClassVar

from django.db import DEFAULT_DB_ALIAS
from django.db import connections as databases
from django.db.backends.base.base import BaseDatabaseWrapper
from django.utils.connection import ConnectionDoesNotExist

from dispytch_integrations._blocking_handoff import LeftMessage
from dispytch_integrations._blocking_way import Prepared
from dispytch_integrations._overriding import CommitState, overriding
from dispytch_integrations.django import conf
from dispytch_integrations.django._connections import connections, tell_after_commit
from dispytch_integrations.django.errors import TransactionError
from dispytch_integrations.message import Message

__all__ = [
    "AfterCommit",
    "Waiting",
    "after_commit",
    "after_write",
    "call_after",
    "is_of_testcase",
    "register",
    "transaction_meant",
    "transaction_of_write",
]


class AfterCommit:
    """What Django calls after a commit, before the callbacks of others. Raises nothing."""

    def __call__(self) -> None:
        """The transaction is committed."""


_RECEIVERS_SECONDS = 1.0
"""How long a commit waits for receivers of what went to memory. They may need what the caller holds."""


class Waiting(AfterCommit):
    """Messages that wait for the end of a transaction.

    `connection`: the database connection, of the thread that emitted; None: no transaction is open, they are handed
    over at once. `done`: has it been committed?
    """

    waits: ClassVar[CommitState] = "pending"
    advice = "in a TestCase emit inside `with self.captureOnCommitCallbacks(execute=True):`"

    def __init__(self, prepared: Sequence[Prepared], connection: BaseDatabaseWrapper | None) -> None:
        self.prepared = prepared
        self.connection = connection
        self.done = False
        self._context: Context = copy_context()

    def __call__(self) -> None:
        """The transaction is committed: leave the messages to the event loop. Raises nothing."""
        self.done = True
        self.send(self.prepared)

    def send(self, prepared: Sequence[Prepared], *, direct: bool = True) -> None:
        """Leave messages to the event loop; what hinders that is told as their failure. `direct`: see `reach`."""
        waiting, context = prepared, self._context
        try:
            while waiting:
                session = connections.reach(direct=direct)
                # Looked up again: between the call and the commit, settings may have changed, or the process have
                # forked. Where another thread has closed the session meanwhile, there is a new one.
                brokers = session.brokers.brokers
                taken = session.handoff.put(
                    [LeftMessage(brokers.get(message.broker, outlet), message, context) for outlet, message in waiting]
                )
                if all(outlet.producer.immediate for outlet, _ in waiting):
                    connections.receivers.flush(_RECEIVERS_SECONDS)
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
        """Does it still wait among its connection's callbacks? Not done and not there: rolled back."""
        return self.connection is not None and any(entry[1] is self for entry in self.connection.run_on_commit)

    def states(self) -> Iterable[tuple[Message, CommitState]]:
        """For tests: what has become of each message."""
        state: CommitState = "committed" if self.done else self.waits if self.registered else "rolled back"
        return [(message, state) for _, message in self.prepared]


def after_write(prepared: Sequence[Prepared], database: str) -> None:
    """Hand messages over when a write is committed that was made on `database`; at once where it is already."""
    register(Waiting(prepared, transaction_of_write(database)))


def after_commit(prepared: Sequence[Prepared], using: str | None, require_transaction: bool | None) -> None:
    """Hand messages over when the transaction is committed that `emit_on_commit` means; at once where there is none.

    Raises as `transaction_meant`.
    """
    register(Waiting(prepared, transaction_meant(using, require_transaction)))


def transaction_of_write(database: str) -> BaseDatabaseWrapper | None:
    """The connection on which a write was made, if its transaction is still open. Raises TransactionError.

    Of a signal it is known where the write went: other databases' transactions do not matter.
    """
    connection = databases[database]
    if connection.in_atomic_block:
        return connection
    if _manual(connection):
        raise _by_hand(database)
    return None


def transaction_meant(using: str | None, require_transaction: bool | None) -> BaseDatabaseWrapper | None:
    """The connection whose transaction `emit_on_commit` means; None: none is open.

    Raises TransactionError where that cannot be told, or where there is none and one is required.
    """
    connection = _connection(using)
    required = conf.require_transaction() if require_transaction is None else require_transaction
    # A TestCase's own block does not count: the same code has none outside of the test.
    if required and (connection is None or _only_of_testcase(connection)):
        named = f" on database {using!r}" if using is not None else ""
        raise TransactionError(
            f"no transaction is open{named}, and one is required: emit inside `with transaction.atomic():`, "
            f"or give require_transaction=False"
        )
    return connection


def register(waiting: Waiting) -> None:
    """Let it be called at the end of its transaction; at once where there is none. Tests see it."""
    overriding.tell(waiting)
    if waiting.connection is not None:
        for outlet, message in waiting.prepared:
            outlet.held(message)
    if waiting.connection is None:
        waiting()
    else:
        call_after(waiting.connection, waiting)


def call_after(connection: BaseDatabaseWrapper, callback: AfterCommit) -> None:
    """Let Django call it after the commit of the transaction that is open on this connection."""
    connection.on_commit(callback)
    _put_forward(connection)


def _put_forward(connection: BaseDatabaseWrapper) -> None:
    """Move the callback that was registered last in front of those of others, behind our own.

    Django drops all callbacks behind one that raises: an event of a committed transaction would be gone without a word.
    """
    callbacks: list[tuple[Any, ...]] = connection.run_on_commit
    if len(callbacks) < 2 or isinstance(callbacks[-2][1], AfterCommit):
        return
    if any(is_of_testcase(block) for block in connection.atomic_blocks):
        return  # captureOnCommitCallbacks knows what is new by its place; in a TestCase there is no commit.
    newest = callbacks.pop()
    # By halves: ours stand in front, and an import may have thousands of either kind.
    callbacks.insert(bisect_left(callbacks, True, key=lambda entry: not isinstance(entry[1], AfterCommit)), newest)


def _connection(using: str | None) -> BaseDatabaseWrapper | None:
    """The connection whose transaction is meant; None: none is open. Raises TransactionError."""
    open_ones = _open_transactions()
    if using is None:
        if len(open_ones) > 1:
            raise TransactionError(
                f"transactions are open on the databases {_listed(open_ones)}, and the event can wait for one of them: "
                f"write using={open_ones[0].alias!r}"
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
    elsewhere = [other for other in open_ones if other is not connection and not _only_of_testcase(other)]
    if connection.in_atomic_block and not (elsewhere and _only_of_testcase(connection)):
        return connection
    if open_ones:
        raise TransactionError(
            f"no transaction is open on database {using!r}, but on {_listed(open_ones)}: the event would go out at "
            f"once; write using={open_ones[0].alias!r}, or open one with transaction.atomic(using={using!r})"
        )
    if _manual(connection):
        raise _by_hand(using)
    return None


def _by_hand(alias: str) -> TransactionError:
    return TransactionError(
        f"database {alias!r} is committed by hand (autocommit is off), and Django tells nobody when: emit inside "
        f"`with transaction.atomic(using={alias!r}):`, or call emit() after the commit"
    )


def _open_transactions() -> list[BaseDatabaseWrapper]:
    """This thread's connections with a transaction open, which the program opened and not Django's TestCase.

    TestCase opens one on every database; where it alone has, the event belongs to its first, so that
    captureOnCommitCallbacks sees it.
    """
    opened = [connection for connection in databases.all(initialized_only=True) if connection.in_atomic_block]
    if len(opened) < 2:
        return opened
    own = [connection for connection in opened if not _only_of_testcase(connection)]
    return own or [next((each for each in opened if each.alias == DEFAULT_DB_ALIAS), opened[0])]


def _only_of_testcase(connection: BaseDatabaseWrapper) -> bool:
    return all(is_of_testcase(block) for block in connection.atomic_blocks)


def is_of_testcase(block: Any) -> bool:
    """Was an atomic block opened by Django's TestCase, and not by the program?"""
    return bool(getattr(block, "_from_testcase", False))


def _listed(connections: Sequence[BaseDatabaseWrapper]) -> str:
    return " and ".join(repr(connection.alias) for connection in connections)


def _manual(connection: BaseDatabaseWrapper) -> bool:
    """Does the program commit by itself? Django then refuses on_commit outside of atomic()."""
    if connection.connection is None:
        return not connection.settings_dict["AUTOCOMMIT"]
    return not connection.autocommit
