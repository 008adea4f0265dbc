"""Litestar: the emitter around the app, and a dependency that gives it to the handlers.

DISPYTCH_URL=redis://localhost:6379 uvicorn example_projects.recipes.litestar_app:app
curl -X POST localhost:8000/orders/1
"""

from __future__ import annotations

from typing import Any

from litestar import Litestar, Request, Response, post
from litestar.di import NamedDependency, Provide
from litestar.logging import LoggingConfig
from litestar.params import FromPath
from litestar.types import Scope

from dispytch_integrations import EventBase, EventEmitter
from dispytch_integrations.errors import DeliveryError
from dispytch_integrations.redis import RedisStreamEventRoute
from dispytch_integrations.starlette import EmitterMiddleware, get_emitter


class OrderPlaced(EventBase):
    """What is told when an order is placed."""

    __route__ = RedisStreamEventRoute(stream="orders")
    order_id: int


def provide_emitter(scope: Scope) -> EventEmitter:
    """What handlers ask for."""
    return get_emitter(scope)


@post("/orders/{order_id:int}")
async def place_order(order_id: FromPath[int], emitter: NamedDependency[EventEmitter]) -> None:
    """Answered with 201 once the broker has the event."""
    await emitter.emit(OrderPlaced(order_id=order_id))


def not_delivered(request: Request[Any, Any, Any], exc: DeliveryError) -> Response[dict[str, str]]:
    """The client may try again."""
    return Response({"detail": "try again in a moment"}, status_code=503, headers={"Retry-After": "1"})


litestar = Litestar(
    [place_order],
    dependencies={"emitter": Provide(provide_emitter, sync_to_thread=False)},
    exception_handlers={DeliveryError: not_delivered},
    # Errors of handlers are logged in debug mode alone, unless told otherwise.
    logging_config=LoggingConfig(log_exceptions="always"),
)
# Around the app, not in its middleware=: the emitter is opened when the server starts.
app = EmitterMiddleware(litestar)
