"""When a transaction of SQLAlchemy is committed, and which of its messages that means.

A session's messages are collected in the order they came. A savepoint is a place in that order: rolled back, what came
after it is dropped; released, it stays until the outer one decides. At the root's commit records go into the outbox;
once it has ended, and its connection is back in the pool, the others go out.

SQLAlchemy's hooks have traps: `before_commit` and `after_commit` are called for savepoints too, the first one before
the flush; a session that is closed without a commit tells `after_transaction_end` alone; what a hook raises after the
commit leaves the session stuck. A plain connection has no hook after the commit at all.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

from sqlalchemy import Connection, TwoPhaseTransaction, event
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.util.concurrency import in_greenlet

from dispytch_integrations import errors
from dispytch_integrations._overriding import CommitState, overriding
from dispytch_integrations._sqlalchemy_outbox import SQLAlchemyOutbox
from dispytch_integrations._sqlalchemy_sending import Parcel, send, tell_failure
from dispytch_integrations._sqlalchemy_storing import connection_of, is_autocommit, store
from dispytch_integrations.message import Message, log_fields
from dispytch_integrations.outbox.record import Record

__all__ = ["Item", "TransactionError", "after_connection", "after_session", "install"]

logger = logging.getLogger("dispytch_integrations.sqlalchemy")

_KEY = "_dispytch_waiting"
_ADVICE = "an event waits for the commit that comes next: call emit_on_commit before the commit, not after it"


class TransactionError(errors.TransactionError, InvalidRequestError):
    """`emit_on_commit` found no transaction that the event could wait for."""


class Item(NamedTuple):
    """A message that waits for a commit. `outbox`, `record`: where it is stored then; None: it is sent."""

    parcel: Parcel
    outbox: SQLAlchemyOutbox | None = None
    record: Record | None = None


class _Waiting:
    """What waits for the end of one root transaction.

    `late`: the commit has begun, and has stored the records: what comes within it is stored at once. `committed`: it
    is too late for that. `undone`: it was rolled back, as somebody wanted. `over`: it has ended. `released`: the
    savepoint that is being released. `empty`: it began for the events alone, and has written nothing since.
    """

    __slots__ = ("_places", "_stored", "committed", "empty", "items", "late", "over", "released", "undone")

    def __init__(self) -> None:
        self.items: list[Item] = []
        self.late = False
        self.committed = False
        self.undone = False
        self.over = False
        self.empty = False
        self.released: object = None
        self._places: dict[object, int] = {}
        self._stored = 0

    def begin(self, savepoint: object) -> None:
        """A savepoint begins here."""
        self._places[savepoint] = len(self.items)

    def keep(self, savepoint: object) -> None:
        """The savepoint is released: what came after it is what came before it now."""
        self._places.pop(savepoint, None)

    def undo(self, savepoint: object) -> None:
        """Drop what came after the savepoint; one that is not known was there before anything came."""
        place = self._places.pop(savepoint, 0)
        _tell_dropped(self.items[place:], logging.INFO, "its savepoint was rolled back")
        del self.items[place:]
        # A commit that was given up may have stored all of them within this savepoint; stored twice, a row is one.
        self._stored = 0

    def store(self, connection: Callable[[SQLAlchemyOutbox], Connection]) -> None:
        """Store the records that are not yet; they stay to be stored when that fails."""
        records: dict[SQLAlchemyOutbox, list[Record]] = {}
        for item in self._unstored():
            if item.outbox is not None and item.record is not None:
                records.setdefault(item.outbox, []).append(item.record)
        for outbox, made in records.items():
            store(outbox, connection(outbox), made)
            if overriding.active:  # Nobody relays in a test; what is sent is sent after the commit.
                outbox.take_out(connection(outbox), made)
        self._stored = len(self.items)

    @property
    def has_records(self) -> bool:
        """Are there records to be stored?"""
        return any(item.record is not None for item in self._unstored())

    @property
    def is_rolled_back(self) -> bool:
        """Has the root ended without a commit?"""
        return self.over and not self.committed

    def _unstored(self) -> Sequence[Item]:
        return self.items[self._stored :]

    def dropped(self) -> None:
        """The root has ended without a commit: tell whom that may surprise."""
        if self.undone:
            _tell_dropped(self.items, logging.INFO, "its transaction was rolled back")
            return
        # Left by an exception, a session is closed, too; an async one does that where the exception is not seen.
        surprising = self.empty or (sys.exc_info()[0] is None and not in_greenlet())
        _tell_dropped(
            self.items,
            logging.WARNING if surprising else logging.INFO,
            f"the session was closed without a commit ({_ADVICE})",
        )

    def ended(self) -> None:
        """The root has ended, committed: wake the relays, send the others. Raises nothing but a cancellation."""
        parcels = [item.parcel for item in self.items if item.outbox is None]
        if overriding.active:
            parcels = [item.parcel for item in self.items]
        for outbox in {item.outbox: None for item in self.items if item.outbox is not None}:
            try:
                outbox.committed()
            except Exception:
                logger.exception("the relay was not woken; it finds the stored events when it looks again")
        if not parcels:
            return
        try:
            send(parcels)
        except Exception as exc:
            # It is committed: nothing may become of the caller but that it succeeds.
            for parcel in parcels:
                tell_failure(parcel, exc)


def _tell_dropped(items: Sequence[Item], level: int, why: str) -> None:
    if not items or not logger.isEnabledFor(level):
        return
    first = items[0].parcel.message
    if len(items) == 1:
        told = f"{first.type} {first.id}"
    else:
        types = Counter(item.parcel.message.type for item in items)
        told = f"{len(items)} events ({', '.join(f'{number} {name}' for name, number in types.most_common(3))}"
        told += ", ...)" if len(types) > 3 else ")"
    extra = log_fields(first.type, first.id, first.broker, first.destination)
    logger.log(level, "%s not emitted: %s", told, why, extra=extra)


class _Watched:
    """For tests: some of the messages that wait, as they were when they came."""

    advice = "commit the session"

    def __init__(self, waiting: _Waiting, items: Sequence[Item]) -> None:
        self._waiting = waiting
        self._items = list(items)

    def states(self) -> Iterable[tuple[Message, CommitState]]:
        """What has become of each."""
        waiting = self._waiting
        there = {id(item) for item in waiting.items}
        for item in self._items:
            state: CommitState = "pending"
            if id(item) not in there or waiting.is_rolled_back:
                state = "rolled back"
            elif waiting.over:
                state = "under way"
            yield item.parcel.message, state


def _of(place: Session | Connection) -> _Waiting | None:
    return cast("_Waiting | None", vars(place).get(_KEY))


# -- sessions --------------------------------------------------------------------------------------------------------


def after_session(session: Session, items: Sequence[Item]) -> None:
    """Let messages wait for the commit of the session's transaction, which begins now if there is none.

    Raises TransactionError where none can begin, or where records come after the commit.
    """
    install()
    root = session.get_transaction()
    if root is None:
        if not getattr(session, "autobegin", True):
            raise TransactionError(
                "no transaction is open, and the session has autobegin=False: emit inside `with session.begin():`"
            )
        root = session.begin()
        waiting = vars(session).setdefault(_KEY, _Waiting())
        waiting.empty = not (session.new or session.dirty or session.deleted)
    else:
        waiting = vars(session).setdefault(_KEY, _Waiting())
    stored = any(item.record is not None for item in items)
    if stored and waiting.late and not root.is_active:
        raise TransactionError(
            "the transaction is committed or prepared already, and an event is stored in the outbox before that: emit "
            "it earlier, in before_commit or after_flush, or give outbox=False"
        )
    count = len(waiting.items)
    waiting.items.extend(items)
    if overriding.observers:
        overriding.tell(_Watched(waiting, items))
    if stored and waiting.late and _is_in_commit(root):
        try:
            waiting.store(partial(connection_of, session))
        except BaseException:
            del waiting.items[count:]  # The caller has the error, and may go on without them.
            raise


def _is_in_commit(root: SessionTransaction) -> bool:
    # Otherwise the commit was given up, by what another function of before_commit has raised, and may be tried again.
    return getattr(root, "_current_fn", root) is not None


_installing = threading.Lock()
_installed = False


def install() -> None:
    """Listen to all sessions; done once, at the first use."""
    global _installed  # noqa: PLW0603
    if _installed:
        return
    with _installing:
        if _installed:
            return
        # After others' functions, which may emit; what ends a transaction is heard before they can raise.
        event.listen(Session, "before_commit", _before_commit)
        event.listen(Session, "after_begin", _after_begin, insert=True)
        event.listen(Session, "after_transaction_create", _after_create, insert=True)
        event.listen(Session, "after_rollback", _after_rollback, insert=True)
        event.listen(Session, "after_commit", _after_commit, insert=True)
        event.listen(Session, "after_transaction_end", _after_end, insert=True)
        _installed = True


def _before_commit(session: Session) -> None:
    """Store the records in the transaction. What this raises, the commit raises: it can be rolled back."""
    root = session.get_transaction()
    # A root may be committed while a savepoint is open: SQLAlchemy releases that one next.
    if root is None or (session.in_nested_transaction() and not _is_in_commit(root)):
        return
    waiting: _Waiting = vars(session).setdefault(_KEY, _Waiting())
    if waiting.has_records:
        session.flush()
        waiting.store(partial(connection_of, session))
    waiting.late = True


def _after_begin(session: Session, transaction: SessionTransaction, connection: Connection) -> None:
    waiting = _of(session)
    if waiting is not None:
        waiting.empty = False


def _after_rollback(session: Session) -> None:
    waiting = _of(session)
    if waiting is not None and session.get_nested_transaction() is None:
        waiting.undone = True


def _after_create(session: Session, transaction: SessionTransaction) -> None:
    waiting = _of(session)
    if waiting is not None and transaction.nested:
        waiting.begin(transaction)


def _after_commit(session: Session) -> None:
    waiting = _of(session)
    if waiting is None:
        return
    nested = session.get_nested_transaction()
    if nested is None:
        waiting.committed = True
    else:
        waiting.released = nested


def _after_end(session: Session, transaction: SessionTransaction) -> None:
    waiting = _of(session)
    if waiting is None:
        return
    if transaction.nested:
        if waiting.released is transaction:
            waiting.keep(transaction)
        else:
            waiting.undo(transaction)
        waiting.released = None
    elif transaction.parent is None:
        del vars(session)[_KEY]
        waiting.over = True
        if waiting.committed:
            waiting.ended()
        else:
            waiting.dropped()


# -- plain connections -----------------------------------------------------------------------------------------------


def after_connection(connection: Connection, items: Sequence[Item]) -> None:
    """Let messages wait for the commit of the connection's transaction, which begins now if there is none.

    Raises TransactionError where each statement is a transaction of its own, or where it has two phases.
    """
    root = connection.get_transaction()
    if root is None:
        root = connection.begin()
    if isinstance(root, TwoPhaseTransaction):
        raise TransactionError("a two-phase transaction of a plain connection is not supported: use a session")
    if is_autocommit(connection):
        raise TransactionError(
            "the connection commits each statement by itself (AUTOCOMMIT), so there is no commit to wait for: call "
            "emitter.emit(event)"
        )
    waiting = _of(connection)
    if waiting is None or not isinstance(waiting, _OnConnection) or waiting.root is not root:
        waiting = _OnConnection(connection, root)
    waiting.items.extend(items)
    if overriding.observers:
        overriding.tell(_Watched(waiting, items))


class _OnConnection(_Waiting):
    """What waits for the commit of a plain connection.

    SQLAlchemy has no event after it, so the connection's own methods are covered, on this object alone, until it is
    committed or rolled back. One that ended otherwise is found out by its transaction, which is another one then.
    """

    __slots__ = ("_commit", "_connection", "_roll_back", "_roll_back_to", "_savepoint", "root")

    def __init__(self, connection: Connection, root: object) -> None:
        super().__init__()
        own = vars(connection)
        for name in _COVERED:
            own.pop(name, None)
        covered: Any = connection
        self.root = root
        self._connection = connection
        self._commit: Callable[[], None] = covered._commit_impl
        self._roll_back: Callable[[], None] = covered._rollback_impl
        self._savepoint: Callable[..., str] = covered._savepoint_impl
        self._roll_back_to: Callable[[str], None] = covered._rollback_to_savepoint_impl
        own.update(zip(_COVERED, (self.commit, self.roll_back, self.savepoint, self.roll_back_to), strict=True))
        own[_KEY] = self

    @property
    def is_rolled_back(self) -> bool:
        """Has the root ended without a commit? SQLAlchemy does not tell."""
        return not self.committed and self._connection.get_transaction() is not self.root

    def commit(self) -> None:
        """Store the records, commit, send the others."""
        connection = self._connection
        for name in (*_COVERED, _KEY):
            vars(connection).pop(name, None)
        if connection.get_transaction() is not self.root:
            self._commit()
            return
        try:
            self.store(lambda outbox: connection)
        except BaseException:
            # SQLAlchemy takes a commit that failed for rolled back, and would go on with what is still there.
            connection.dialect.do_rollback(connection.connection)
            raise
        self._commit()
        self.committed = self.over = True
        self.ended()

    def roll_back(self) -> None:
        """Roll back, as closing the connection does, too."""
        connection = self._connection
        for name in (*_COVERED, _KEY):
            vars(connection).pop(name, None)
        if connection.get_transaction() is self.root:
            _tell_dropped(
                self.items, logging.INFO, f"the connection was rolled back, or closed without a commit ({_ADVICE})"
            )
        self._roll_back()

    def savepoint(self, name: str | None = None) -> str:
        """A savepoint begins."""
        made = self._savepoint(name)
        self.begin(made)
        return made

    def roll_back_to(self, name: str) -> None:
        """A savepoint is rolled back."""
        if self._connection.get_transaction() is self.root:
            self.undo(name)
        self._roll_back_to(name)


_COVERED = ("_commit_impl", "_rollback_impl", "_savepoint_impl", "_rollback_to_savepoint_impl")
