# pyright: strict, reportUnnecessaryTypeIgnoreComment=true
"""Django: the functions of `dispytch_integrations.django`, its decorator, and its middleware."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any, assert_type

from django.contrib.auth.models import User
from django.db.models.signals import post_delete, post_save

from dispytch_integrations import EventBase
from dispytch_integrations.django import (
    Emitter,
    HeldBack,
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
from dispytch_integrations.errors import DispytchError
from tests.typed.orders import OrderPlaced


def emitting(event: OrderPlaced) -> None:
    returns_nothing: Callable[[EventBase], None] = emit
    returns_nothing(event)
    emit_many([event], headers={"tenant": "acme"})
    assert_type(emit_on_commit(event), str)
    assert_type(emit_on_commit([event, event]), list[str])
    assert_type(emit_on_commit(event, using="orders", require_transaction=True, headers={"a": "b"}), str)

    emit({"order_id": 1})  # type: ignore[arg-type]
    emit_many(event)  # type: ignore[arg-type]
    emit_on_commit("order 1")  # type: ignore[arg-type]
    emit_on_commit("orders", event)  # type: ignore[call-overload]
    emit_on_commit(lambda: emit(event))  # type: ignore[call-overload]
    assert_type(emit_on_commit(event, "orders"), str)


async def emitting_async(event: OrderPlaced) -> None:
    sending: Coroutine[Any, Any, None] = aemit(event)
    await sending
    sending = aemit_many([event])
    await sending
    assert_type(await aemit_on_commit(event), str)
    assert_type(await aemit_on_commit([event]), list[str])
    await aemit([event])  # type: ignore[arg-type]
    await emit_on_commit(event)  # type: ignore[misc]


async def emitters() -> None:
    alerts = get_emitter("alerts")
    assert_type(alerts, Emitter)
    assert_type(get_emitter(), Emitter)
    assert_type(alerts.ping(), dict[str, DispytchError | None])
    assert_type(await alerts.aping(), dict[str, DispytchError | None])
    get_emitter(1)  # type: ignore[arg-type]


@emits(post_save, sender=User)
def user_saved(instance: User, created: bool, **kwargs: Any) -> OrderPlaced | None:
    return OrderPlaced(tenant="acme", order_id=instance.pk) if created else None


@emits([post_save, post_delete], sender="shop.Order", outbox=False)
def order_changed(instance: Any, **kwargs: Any) -> list[OrderPlaced]:
    return [OrderPlaced(tenant="acme", order_id=instance.pk)]


@emits("post_save")  # type: ignore[arg-type]
def by_name(instance: Any, **kwargs: Any) -> OrderPlaced | None:
    return None


def decorated(user: User) -> None:
    """A decorator leaves what it decorates as it was: tests call it."""
    assert_type(user_saved(user, True), OrderPlaced | None)
    assert_type(order_changed(instance=user), list[OrderPlaced])


def suppressing() -> None:
    with suppress_emits() as held:
        assert_type(held, HeldBack)
        assert_type(held.count, int)
        assert_type(held.by_type, Counter[type[EventBase]])

    @suppress_emits()
    def fill(number: int) -> str:
        return str(number)

    assert_type(fill(3), str)
