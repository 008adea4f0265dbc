"""`@emits`: a Django signal becomes an event, after the commit, and once."""

from __future__ import annotations

import asyncio
import gc
import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.contrib.auth.signals import user_logged_in, user_logged_out
from django.core.management import call_command
from django.db import connection, transaction
from django.db.migrations.loader import MigrationLoader
from django.db.models.signals import m2m_changed, post_delete, post_save, pre_delete, pre_save
from django.dispatch import Signal
from django.test import Client, override_settings
from pytest_django import DjangoCaptureOnCommitCallbacks

from dispytch_integrations.django import emits
from dispytch_integrations.django.errors import TransactionError
from dispytch_integrations.django.testing import EmittedEvents
from tests.django.project.shop.events import OrderCancelled, OrderPlaced
from tests.django.project.shop.models import ArchivedOrder, Order, Tag

custom = Signal()
other = Signal()

SIGNALS: list[Any] = [
    post_save, post_delete, pre_save, pre_delete, m2m_changed, user_logged_in, user_logged_out, custom, other,
]  # fmt: skip


@pytest.fixture(autouse=True)
def _no_receivers_left() -> Iterator[None]:
    """What a test connects is its own."""
    before = [list(signal.receivers) for signal in SIGNALS]
    yield
    for signal, receivers in zip(SIGNALS, before, strict=True):
        signal.receivers = receivers
        signal.sender_receivers_cache.clear()


both_databases = pytest.mark.django_db(transaction=True, databases=["default", "archive"])


# -- Django's signals ------------------------------------------------------------------------------------------------


@pytest.mark.django_db(transaction=True)
def test_post_save_becomes_an_event_after_the_commit(emitted_events: EmittedEvents) -> None:
    """The example of the documentation: a new order is announced, a changed one is not."""

    @emits(post_save, sender=Order)
    def order_saved(instance: Order, created: bool, **kwargs: Any) -> OrderPlaced | None:
        return OrderPlaced(number=instance.pk) if created else None

    with transaction.atomic():
        order = Order.objects.create(customer="c")
        assert (emitted_events.emitted, emitted_events.pending) == ([], [OrderPlaced(number=order.pk)])
    assert emitted_events.emitted == [OrderPlaced(number=order.pk)]
    order.save()
    Tag.objects.create(name="another model")
    assert len(emitted_events) == 1
    with pytest.raises(ZeroDivisionError):
        _create_and_fail()
    assert len(emitted_events) == 1
    # Without a transaction each statement is committed by itself.
    Order.objects.create(customer="d")
    assert len(emitted_events) == 2


def _create_and_fail() -> None:
    with transaction.atomic():
        Order.objects.create(customer="never")
        raise ZeroDivisionError


@pytest.mark.django_db
def test_in_a_test_case_it_waits_for_the_captured_commit(
    emitted_events: EmittedEvents, django_capture_on_commit_callbacks: DjangoCaptureOnCommitCallbacks
) -> None:
    """A project's tests see signals' events as those of emit_on_commit."""

    @emits(post_save, sender=Order)
    def saved(instance: Order) -> OrderPlaced:
        return OrderPlaced(number=instance.pk)

    with django_capture_on_commit_callbacks(execute=True):
        order = Order.objects.create(customer="c")
        emitted_events.assert_pending(OrderPlaced, number=order.pk)
    emitted_events.assert_emitted(OrderPlaced, number=order.pk)


@pytest.mark.django_db(transaction=True)
def test_post_delete_becomes_an_event_after_the_commit(emitted_events: EmittedEvents) -> None:
    """The instance still has its primary key; of a queryset, too, each object is told."""
    deleted_in_transaction: list[bool] = []

    @emits(post_delete, sender=Order)
    def order_deleted(instance: Order, **kwargs: Any) -> OrderCancelled:
        deleted_in_transaction.append(connection.in_atomic_block)
        return OrderCancelled(number=instance.pk)

    orders = [Order.objects.create(customer="c") for _ in range(3)]
    keys = [order.pk for order in orders]
    orders[0].delete()
    Order.objects.all().delete()
    assert deleted_in_transaction[0], "Django deletes in a transaction of its own, and the event waits for it"
    assert sorted(event.number for event in emitted_events if isinstance(event, OrderCancelled)) == keys


@pytest.mark.django_db(transaction=True)
def test_m2m_changed_becomes_an_event(emitted_events: EmittedEvents) -> None:
    """One signal for several actions: None for those that are of no interest."""

    @emits(m2m_changed, sender=Order.tags.through)
    def tagged(instance: Order, action: str, pk_set: set[int] | None, **kwargs: Any) -> list[OrderPlaced] | None:
        return [OrderPlaced(number=key) for key in sorted(pk_set or ())] if action == "post_add" else None

    order = Order.objects.create(customer="c")
    tags = [Tag.objects.create(name=str(number)) for number in range(2)]
    order.tags.add(*tags)
    order.tags.clear()
    assert emitted_events.emitted == [OrderPlaced(number=tag.pk) for tag in tags]


@pytest.mark.django_db
def test_user_logged_in_becomes_an_event(
    emitted_events: EmittedEvents, django_capture_on_commit_callbacks: DjangoCaptureOnCommitCallbacks
) -> None:
    """A signal that knows no database waits for whatever transaction is open."""

    @emits(user_logged_in)
    def logged_in(user: Any, request: Any) -> OrderPlaced:
        assert request is not None
        return OrderPlaced(number=user.pk)

    user = User.objects.create_user("u", password="p")
    with django_capture_on_commit_callbacks(execute=True):
        user_logged_in.send(type(user), request=Client().request().wsgi_request, user=user)
        emitted_events.assert_pending(OrderPlaced, number=user.pk)
    emitted_events.assert_emitted(OrderPlaced, number=user.pk)


@pytest.mark.django_db(transaction=True)
def test_what_sends_no_signals_emits_nothing(emitted_events: EmittedEvents) -> None:
    """As documented: who writes with update() and bulk_create() emits by hand."""

    @emits([post_save, post_delete], sender=Order)
    def changed(instance: Order) -> OrderPlaced:
        return OrderPlaced(number=1)

    orders = Order.objects.bulk_create([Order(customer="c"), Order(customer="d")])
    Order.objects.update(customer="e")
    Order.objects.bulk_update(orders, ["customer"])
    Order.objects.all()._raw_delete("default")
    assert (emitted_events.emitted, emitted_events.pending) == ([], [])


# -- signals of one's own --------------------------------------------------------------------------------------------


def test_a_custom_signal_becomes_events(emitted_events: EmittedEvents) -> None:
    """An event, a list, any iterable, or nothing."""

    @emits(custom)
    def happened(numbers: list[int]) -> Any:
        if not numbers:
            return None
        return OrderPlaced(number=numbers[0]) if len(numbers) == 1 else (OrderPlaced(number=each) for each in numbers)

    for numbers in ([], [1], [2, 3]):
        custom.send("sender", numbers=numbers)
    custom.send_robust(None, numbers=[4])
    assert emitted_events.emitted == [OrderPlaced(number=number) for number in (1, 2, 3, 4)]


async def test_a_signal_that_is_sent_by_async_code_becomes_an_event(emitted_events: EmittedEvents) -> None:
    """Django runs the function in a thread, in which a transaction could be open."""

    @emits(custom)
    def happened(number: int) -> OrderPlaced:
        with pytest.raises(RuntimeError):
            asyncio.get_running_loop()
        return OrderPlaced(number=number)

    await custom.asend(None, number=1)
    assert emitted_events.emitted == [OrderPlaced(number=1)]


@pytest.mark.django_db(transaction=True)
def test_several_signals_and_senders(emitted_events: EmittedEvents) -> None:
    """One function for whatever means the same."""

    @emits((post_save, post_delete), sender=[Order, Tag])
    def touched(sender: type[Any], signal: Signal, **kwargs: Any) -> OrderCancelled:
        return OrderCancelled(number=1, reason=f"{sender.__name__} {'saved' if signal is post_save else 'deleted'}")

    Order.objects.create(customer="c").delete()
    Tag.objects.create(name="t")
    User.objects.create_user("u")
    reasons = [event.reason for event in emitted_events if isinstance(event, OrderCancelled)]
    assert reasons == ["Order saved", "Order deleted", "Tag saved"]


@pytest.mark.django_db(transaction=True)
def test_a_sender_may_be_named_before_it_exists(emitted_events: EmittedEvents) -> None:
    """`sender="app.Model"` spares the import of another app's models."""

    @emits([post_save, post_delete], sender=["shop.Order", "shop.Order_tags", "shop.Nowhere"])
    def saved(instance: Any, **kwargs: Any) -> OrderPlaced:
        return OrderPlaced(number=instance.pk)

    order = Order.objects.create(customer="c")
    Tag.objects.create(name="t")
    assert emitted_events.emitted == [OrderPlaced(number=order.pk)]


@pytest.mark.django_db(transaction=True)
def test_without_a_sender_it_hears_everybody(emitted_events: EmittedEvents) -> None:
    """An audit log wants all of them."""

    @emits(post_save)
    def saved(sender: type[Any]) -> OrderCancelled:
        return OrderCancelled(number=0, reason=sender.__name__)

    Order.objects.create(customer="c")
    Tag.objects.create(name="t")
    assert [event.reason for event in emitted_events if isinstance(event, OrderCancelled)] == ["Order", "Tag"]


@pytest.mark.parametrize("names", [{"function": 1}, {"accepted": 2}, {"event": 3, "using_": 4}])
def test_a_signals_arguments_may_have_any_name(names: dict[str, int], emitted_events: EmittedEvents) -> None:
    """Whoever declared the signal knew nothing of us."""

    @emits(custom)
    def happened(**kwargs: Any) -> OrderPlaced:
        return OrderPlaced(number=sum(value for name, value in kwargs.items() if name in names))

    custom.send(None, **names)
    assert emitted_events.emitted == [OrderPlaced(number=sum(names.values()))]


# -- what is skipped -------------------------------------------------------------------------------------------------


@pytest.mark.django_db(transaction=True)
def test_loaddata_emits_nothing(emitted_events: EmittedEvents, tmp_path: Path) -> None:
    """A fixture restores what happened long ago; relations may not be there yet."""
    called: list[object] = []

    @emits(post_save)
    def saved(**kwargs: Any) -> OrderPlaced:
        called.append(kwargs)
        return OrderPlaced(number=1)

    fixture = tmp_path / "orders.json"
    fixture.write_text(json.dumps([{"model": "shop.order", "pk": 7, "fields": {"customer": "c", "tags": []}}]))
    call_command("loaddata", str(fixture), verbosity=0)
    assert Order.objects.filter(pk=7).exists()
    assert (emitted_events.emitted, called) == ([], [])


@pytest.mark.django_db(transaction=True)
def test_historical_models_emit_nothing(emitted_events: EmittedEvents) -> None:
    """A data migration works with models that lack what the code of today reads."""
    called: list[object] = []

    @emits([post_save, post_delete])
    def saved(**kwargs: Any) -> OrderPlaced:
        called.append(kwargs)
        return OrderPlaced(number=1)

    historical: Any = (
        MigrationLoader(connection).project_state(("shop", "0001_initial")).apps.get_model("shop", "Order")
    )
    assert historical is not Order
    historical.objects.create(customer="c").delete()
    assert (emitted_events.emitted, called) == ([], [])


# -- which database --------------------------------------------------------------------------------------------------


@both_databases
def test_the_database_is_the_signals(emitted_events: EmittedEvents) -> None:
    """The router writes to the archive: the event waits for the archive's commit, whatever else is open."""

    @emits([post_save, post_delete], sender=ArchivedOrder)
    def archived(instance: ArchivedOrder) -> OrderPlaced:
        return OrderPlaced(number=instance.pk)

    with transaction.atomic(using="archive"):
        with transaction.atomic():
            order = ArchivedOrder.objects.create(customer="c")
            key = order.pk
        assert emitted_events.emitted == [], "the commit of the other database is not its own"
        assert emitted_events.pending == [OrderPlaced(number=key)]
    assert emitted_events.emitted == [OrderPlaced(number=key)]

    with transaction.atomic():
        order.delete()
        assert len(emitted_events) == 2, "deleted in a transaction of its own on the archive, which is committed"


@both_databases
def test_a_signal_without_a_database_and_two_transactions_is_an_error(emitted_events: EmittedEvents) -> None:
    """As with emit_on_commit: guessing would lose the event, or send one that was rolled back."""

    @emits(custom)
    def happened() -> OrderPlaced:
        return OrderPlaced(number=1)

    with transaction.atomic(), transaction.atomic(using="archive"):
        with pytest.raises(TransactionError, match="'default' and 'archive'"):
            custom.send(None)
        custom.send(None, using="archive")
        emitted_events.assert_pending(OrderPlaced)
    emitted_events.assert_emitted(OrderPlaced)


# -- how it is connected ---------------------------------------------------------------------------------------------

MODULE = """
from dispytch_integrations.django import emits
from django.db.models.signals import post_save
from tests.django.project.shop.events import OrderPlaced
from tests.django.test_emits import custom

@emits(custom)
def happened(number):
    return OrderPlaced(number=number + {more})

@emits(post_save, sender="shop.Order")
def saved(instance):
    return OrderPlaced(number=1000 + {more})
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unique: str) -> Iterator[Callable[[int], None]]:
    """A function that imports a module of a project anew, with a changed text."""
    path = tmp_path / f"handlers{unique}.py"
    monkeypatch.syspath_prepend(tmp_path)

    def load(more: int) -> None:
        path.write_text(MODULE.replace("{more}", str(more)))
        sys.modules.pop(path.stem, None)
        importlib.invalidate_caches()
        monkeypatch.setattr(sys, "dont_write_bytecode", True)
        importlib.import_module(path.stem)

    yield load
    sys.modules.pop(path.stem, None)


@pytest.mark.django_db(transaction=True)
def test_a_module_that_is_imported_twice_emits_once(
    module: Callable[[int], None], emitted_events: EmittedEvents
) -> None:
    """Two ways to one module, or an autoreload: one order is one event, made by the newest code."""
    module(0)
    module(1)
    custom.send(None, number=5)
    Order.objects.create(customer="c")
    assert emitted_events.emitted == [OrderPlaced(number=6), OrderPlaced(number=1001)]


def test_two_functions_hear_one_signal(emitted_events: EmittedEvents) -> None:
    """They have different names; one does not replace the other."""

    @emits(custom)
    def one(number: int) -> OrderPlaced:
        return OrderPlaced(number=number)

    @emits(custom)
    def two(number: int) -> OrderCancelled:
        return OrderCancelled(number=number)

    custom.send(None, number=1)
    assert emitted_events.emitted == [OrderPlaced(number=1), OrderCancelled(number=1)]


def test_one_function_may_be_decorated_for_each_of_its_senders(emitted_events: EmittedEvents) -> None:
    """Stacked decorators, as with `@receiver`."""

    @emits(custom, sender="a")
    @emits(custom, sender="b")
    @emits(other)
    def happened(number: int) -> OrderPlaced:
        return OrderPlaced(number=number)

    custom.send("a", number=1)
    custom.send("b", number=2)
    custom.send("c", number=3)
    other.send(None, number=4)
    assert emitted_events.emitted == [OrderPlaced(number=1), OrderPlaced(number=2), OrderPlaced(number=4)]


def test_it_is_kept_alive(emitted_events: EmittedEvents) -> None:
    """Django forgets a receiver that nobody refers to, silently; ours is made by decorators in functions, too."""

    def connect() -> None:
        @emits(custom)
        def happened(number: int) -> OrderPlaced:
            return OrderPlaced(number=number)

    connect()
    gc.collect()
    custom.send(None, number=1)
    assert emitted_events.emitted == [OrderPlaced(number=1)]


def test_the_function_stays_an_ordinary_one(emitted_events: EmittedEvents) -> None:
    """Its test calls it, with an unsaved object, and looks at what it returns."""

    def saved(instance: Order, created: bool, **kwargs: Any) -> OrderPlaced | None:
        """Announce an order."""
        return OrderPlaced(number=instance.pk) if created else None

    decorated = emits(post_save, sender=Order)(saved)
    assert decorated is saved
    assert decorated(Order(pk=7), created=True) == OrderPlaced(number=7)
    assert decorated(instance=Order(pk=7), created=False) is None
    assert (emitted_events.emitted, emitted_events.pending) == ([], [])


def test_the_function_gets_the_arguments_that_it_names(emitted_events: EmittedEvents) -> None:
    """Django demands `**kwargs` of receivers; a function that returns an event need not have it."""
    seen: list[dict[str, Any]] = []

    @emits(custom)
    def few(number: int, missing: str = "default") -> None:
        seen.append({"number": number, "missing": missing})

    @emits(custom)
    def all_of_it(number: int, **rest: Any) -> None:
        seen.append({"number": number, **rest})

    @emits(custom)
    def none() -> None:
        seen.append({})

    custom.send("sender", number=1, colour="red")
    assert seen == [
        {"number": 1, "missing": "default"},
        {"number": 1, "colour": "red", "signal": custom, "sender": "sender"},
        {},
    ]


def test_what_the_function_raises_is_raised_where_the_signal_is_sent(emitted_events: EmittedEvents) -> None:
    """As with any receiver: a mistake in it is seen in development."""

    @emits(custom)
    def happened(number: int) -> OrderPlaced:
        return OrderPlaced(number=1 // number)

    with pytest.raises(ZeroDivisionError):
        custom.send(None, number=0)
    assert len(emitted_events) == 0


# -- what is refused -------------------------------------------------------------------------------------------------


def test_a_coroutine_function_is_refused() -> None:
    """Its coroutine would be taken for an event, or never awaited."""
    with pytest.raises(TypeError, match="saved is a coroutine function; write `def`: it returns events"):

        @emits(post_save, sender=Order)
        async def saved(instance: Order) -> OrderPlaced:
            return OrderPlaced(number=1)


@pytest.mark.parametrize("wrong", [[], ["post_save"], [post_save, Order], "post_save", Order, lambda: None, None])
def test_what_is_no_signal_is_refused(wrong: Any) -> None:
    """`@emits(Order)` means a sender, `@emits` without parentheses nothing: both would be silent for ever."""
    with pytest.raises(TypeError, match="emits\\(\\) takes a Django signal, or several"):
        emits(wrong)


@both_databases
@override_settings(DISPYTCH_REQUIRE_TRANSACTION=True)
def test_a_save_beside_a_transaction_of_another_database_is_told(emitted_events: EmittedEvents) -> None:
    """The row is committed when the signal comes: an error would fail a save that is done, silence lose its event."""

    @emits(post_save, sender=Order)
    def order_saved(instance: Order) -> list[OrderPlaced]:
        return [OrderPlaced(number=instance.pk)]

    with transaction.atomic(using="archive"):
        order = Order.objects.create(customer="Ada")
        assert emitted_events.emitted == [OrderPlaced(number=order.pk)]
