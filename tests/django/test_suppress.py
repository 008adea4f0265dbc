"""`suppress_emits`: nothing goes out inside, whoever asks for it, and what was held back is counted."""

from __future__ import annotations

import asyncio
import inspect
import threading
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Any, cast

import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.db import transaction
from django.dispatch import Signal
from pytest_django import DjangoCaptureOnCommitCallbacks, Settings

from dispytch_integrations import event_id
from dispytch_integrations.django import (
    aemit,
    aemit_many,
    aemit_on_commit,
    emit,
    emit_many,
    emit_on_commit,
    emits,
    get_emitter,
    suppress_emits,
)
from dispytch_integrations.django._connections import connections
from dispytch_integrations.django.testing import EmittedEvents
from dispytch_integrations.errors import RouteError
from tests.django.project.shop.events import OrderCancelled, OrderPlaced

imported = Signal()


@emits(imported)
def announce(number: int) -> OrderPlaced:
    return OrderPlaced(number=number)


def test_nothing_goes_out_inside_the_block(emitted_events: EmittedEvents) -> None:
    """An import of ten thousand orders must not mail ten thousand customers."""
    with suppress_emits() as held:
        emit(OrderPlaced(number=1))
        emit_many([OrderPlaced(number=2), OrderCancelled(number=2)])
        emit_on_commit(OrderPlaced(number=3))
        emit_on_commit([OrderPlaced(number=4), OrderPlaced(number=5)])
        get_emitter("default").emit(OrderPlaced(number=6))
        imported.send(None, number=7)
    assert (emitted_events.emitted, emitted_events.pending) == ([], [])
    assert held.count == 8
    assert held.by_type == {OrderPlaced: 7, OrderCancelled: 1}
    assert repr(held) == "<HeldBack 8 (OrderPlaced: 7, OrderCancelled: 1)>"
    emit(OrderPlaced(number=8))
    assert emitted_events.emitted == [OrderPlaced(number=8)]
    assert held.count == 8, "counted inside the block only"


async def test_nothing_goes_out_of_async_code(emitted_events: EmittedEvents) -> None:
    """The same for the async twins."""
    with suppress_emits() as held:
        await aemit(OrderPlaced(number=1))
        await aemit_many([OrderPlaced(number=2), OrderPlaced(number=3)])
        await aemit_on_commit(OrderPlaced(number=4))
        await aemit_on_commit([OrderPlaced(number=5)])
        await sync_to_async(emit)(OrderPlaced(number=6))
    assert (len(emitted_events), held.count) == (0, 6)
    await aemit(OrderPlaced(number=7))
    assert len(emitted_events) == 1


def test_no_broker_and_no_settings_are_needed(settings: Settings) -> None:
    """A data migration runs where the broker is not reachable, or not configured yet."""
    settings.DISPYTCH = {}
    with suppress_emits() as held:
        emit(OrderPlaced(number=1))
        emit_on_commit(OrderPlaced(number=2))
    assert held.count == 2
    assert connections.session is None


def test_emit_on_commit_returns_the_ids_all_the_same() -> None:
    """Code that stores the event's id must not fail in an import."""
    event, others = OrderPlaced(number=1), [OrderPlaced(number=2), OrderPlaced(number=3)]
    with suppress_emits():
        assert emit_on_commit(event) == event_id(event)
        assert emit_on_commit(others) == [event_id(each) for each in others]
        assert emit_on_commit(iter(others)) == [event_id(each) for each in others]


def test_what_is_no_event_is_refused_all_the_same() -> None:
    """A mistake does not hide until the import is over."""
    with suppress_emits() as held, pytest.raises(RouteError):
        emit(cast("Any", "OrderPlaced"))
    assert held.count == 0


@pytest.mark.django_db
def test_events_from_before_the_block_are_sent_as_their_transaction_says(
    emitted_events: EmittedEvents, django_capture_on_commit_callbacks: DjangoCaptureOnCommitCallbacks
) -> None:
    """They were emitted; and what was held back does not come out after the block."""
    with django_capture_on_commit_callbacks(execute=True), transaction.atomic():
        emit_on_commit(OrderPlaced(number=1))
        with suppress_emits():
            emit_on_commit(OrderPlaced(number=2))
        emit_on_commit(OrderPlaced(number=3))
    assert emitted_events.emitted == [OrderPlaced(number=1), OrderPlaced(number=3)]


@pytest.mark.django_db(transaction=True)
def test_a_commit_inside_the_block_sends_what_was_emitted_before_it(emitted_events: EmittedEvents) -> None:
    """The block is about emitting, not about delivering."""
    block = suppress_emits()
    with transaction.atomic():
        emit_on_commit(OrderPlaced(number=1))
        block.__enter__()
    block.__exit__(None, None, None)
    assert emitted_events.emitted == [OrderPlaced(number=1)]


def test_blocks_may_be_nested(emitted_events: EmittedEvents) -> None:
    """A helper that suppresses may be called by one that does; the innermost counts."""
    with suppress_emits() as outer:
        emit(OrderPlaced(number=1))
        with suppress_emits() as inner:
            emit(OrderPlaced(number=2))
            emit(OrderPlaced(number=3))
        emit(OrderPlaced(number=4))
    assert (outer.count, inner.count, len(emitted_events)) == (2, 2, 0)
    emit(OrderPlaced(number=5))
    assert len(emitted_events) == 1


def test_one_object_may_be_entered_again_and_within_itself(emitted_events: EmittedEvents) -> None:
    """A decorated function that calls itself."""
    block = suppress_emits()
    with block as outer, block as inner:
        emit(OrderPlaced(number=1))
    assert (outer.count, inner.count) == (0, 1)
    emit(OrderPlaced(number=2))
    with block as again:
        emit(OrderPlaced(number=3))
    assert again.count == 1
    assert emitted_events.emitted == [OrderPlaced(number=2)]


def test_the_end_of_the_block_is_the_end_whatever_was_raised(emitted_events: EmittedEvents) -> None:
    """An import that failed must not silence the worker for good."""
    with pytest.raises(ZeroDivisionError), suppress_emits():
        raise ZeroDivisionError
    emit(OrderPlaced(number=1))
    assert len(emitted_events) == 1


def test_other_threads_are_not_silenced(emitted_events: EmittedEvents) -> None:
    """While one request imports, the others go on; a thread that is to be silent gets the context."""
    with suppress_emits() as held, ThreadPoolExecutor(1) as pool:
        pool.submit(emit, OrderPlaced(number=1)).result()
        pool.submit(copy_context().run, emit, OrderPlaced(number=2)).result()
        emit(OrderPlaced(number=3))
    assert emitted_events.emitted == [OrderPlaced(number=1)]
    assert held.count == 2


def test_threads_that_suppress_at_the_same_time_count_their_own(emitted_events: EmittedEvents) -> None:
    """One decorated function, called by every thread of a server."""
    counts: list[int] = []
    meeting = threading.Barrier(4, timeout=20)
    block = suppress_emits()

    def work(number: int) -> None:
        with block as held:
            meeting.wait()
            for _ in range(number):
                emit(OrderPlaced(number=number))
            meeting.wait()
        counts.append(held.count)
        emit(OrderPlaced(number=number))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(counts) == [0, 1, 2, 3]
    assert len(emitted_events) == 4


async def test_other_tasks_are_not_silenced(emitted_events: EmittedEvents) -> None:
    """Tasks share a thread, and not their silence; those started inside inherit it."""
    inside, leave = asyncio.Event(), asyncio.Event()

    async def silent() -> int:
        with suppress_emits() as held:
            inside.set()
            await leave.wait()
            await aemit(OrderPlaced(number=1))
            await asyncio.create_task(aemit(OrderPlaced(number=2)))
        await aemit(OrderPlaced(number=3))
        return held.count

    task = asyncio.create_task(silent())
    await inside.wait()
    await aemit(OrderPlaced(number=4))
    leave.set()
    assert await task == 2
    assert emitted_events.emitted == [OrderPlaced(number=4), OrderPlaced(number=3)]


async def test_tasks_that_share_one_object_end_their_own_block(emitted_events: EmittedEvents) -> None:
    """Decorated coroutines overlap in any order: the first that ends must not wake the others."""
    block = suppress_emits()
    first_in, second_out = asyncio.Event(), asyncio.Event()

    async def first() -> None:
        with block:
            first_in.set()
            await second_out.wait()
            await aemit(OrderPlaced(number=1))
        await aemit(OrderPlaced(number=2))

    async def second() -> None:
        await first_in.wait()
        with block:
            await aemit(OrderPlaced(number=3))
        await aemit(OrderPlaced(number=4))
        second_out.set()

    await asyncio.gather(first(), second())
    assert emitted_events.emitted == [OrderPlaced(number=4), OrderPlaced(number=2)]


async def test_a_block_may_be_left_in_a_copy_of_its_context(emitted_events: EmittedEvents) -> None:
    """Async fixtures and sync_to_async enter in one context and leave in the next."""
    block = suppress_emits()
    held = await sync_to_async(block.__enter__)()
    await aemit(OrderPlaced(number=1))
    await sync_to_async(block.__exit__)(None, None, None)
    await aemit(OrderPlaced(number=2))
    assert (held.count, emitted_events.emitted) == (1, [OrderPlaced(number=2)])


@suppress_emits()
def import_orders(count: int) -> int:
    """Import orders."""
    for number in range(count):
        emit(OrderPlaced(number=number))
    return count


@suppress_emits()
async def aimport_orders(count: int) -> int:
    """Import orders."""
    for number in range(count):
        await aemit(OrderPlaced(number=number))
        await asyncio.sleep(0)
    return count


def test_it_decorates_functions(emitted_events: EmittedEvents) -> None:
    """What runs as RunPython, or as a command, is one function; arguments and docstring are its own."""
    assert (import_orders(3), import_orders(count=2), import_orders.__doc__) == (3, 2, "Import orders.")
    assert async_to_sync(aimport_orders)(3) == 3
    assert inspect.iscoroutinefunction(aimport_orders)
    assert len(emitted_events) == 0
    emit(OrderPlaced(number=1))
    assert len(emitted_events) == 1


async def test_it_decorates_coroutine_functions(emitted_events: EmittedEvents) -> None:
    """The block lasts until the coroutine has ended, and covers nothing beside it."""

    async def loud() -> None:
        for number in range(3):
            await aemit(OrderPlaced(number=number))

    await asyncio.gather(aimport_orders(3), loud(), aimport_orders(3))
    assert len(emitted_events) == 3


def test_it_decorates_no_class() -> None:
    """A class would be wrapped into a function, and its tests found no more."""
    with pytest.raises(TypeError, match=r"not the class Tests; .* in setUp: self.enterContext\(suppress_emits\(\)\)"):

        @suppress_emits()
        class Tests:
            pass
