"""Events from Django: after the commit, from views, signals, commands and tasks, under every server.

    INSTALLED_APPS += ["dispytch_integrations.django"]
    DISPYTCH = {"default": {"URL": "kafka://localhost:9092"}}

    from dispytch_integrations.django import emit_on_commit

    def place_order(request):
        order = Order.objects.create(...)
        emit_on_commit(OrderPlaced(order_id=order.pk))

All functions here are methods of one `Emitter`, over the brokers of DISPYTCH, which are connected at their first use.
"""

from __future__ import annotations

from dispytch_integrations._missing import is_missing
from dispytch_integrations.errors import MissingExtraError

try:
    import django as _django
except ModuleNotFoundError as exc:
    if not is_missing(exc, "django"):
        raise  # present, but one of its own imports is missing
    raise MissingExtraError("dispytch_integrations.django", extra="django") from exc

from dispytch_integrations.django._emits import emits
from dispytch_integrations.django._emitter import Emitter
from dispytch_integrations.django._suppress import HeldBack, suppress_emits

__all__ = [
    "Emitter",
    "HeldBack",
    "aemit",
    "aemit_many",
    "aemit_on_commit",
    "emit",
    "emit_many",
    "emit_on_commit",
    "emits",
    "get_emitter",
    "suppress_emits",
]

del _django

_project = Emitter()

emit = _project.emit
aemit = _project.aemit
emit_many = _project.emit_many
aemit_many = _project.aemit_many
emit_on_commit = _project.emit_on_commit
aemit_on_commit = _project.aemit_on_commit


def get_emitter(alias: str | None = None) -> Emitter:
    """An emitter over the brokers of DISPYTCH.

    `alias`: the broker that takes all its events, whatever their `__broker__`; None: each event's own. Opens nothing;
    an alias that does not exist raises RouteError at the first emit.
    """
    return _project if alias is None else Emitter(alias)
