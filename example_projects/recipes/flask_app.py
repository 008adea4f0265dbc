"""Flask: brokers that the app's factory starts, and an emitter for its views.

DISPYTCH_URL=redis://localhost:6379 flask --app example_projects.recipes.flask_app run
DISPYTCH_URL=redis://localhost:6379 gunicorn --threads 8 'example_projects.recipes.flask_app:create_app()'
curl -X POST localhost:5000/orders/1
"""

from __future__ import annotations

from flask import Flask

from dispytch_integrations import EventBase
from dispytch_integrations.blocking import connect_blocking
from dispytch_integrations.errors import DeliveryError
from dispytch_integrations.redis import RedisStreamEventRoute


class OrderPlaced(EventBase):
    """What is told when an order is placed."""

    __route__ = RedisStreamEventRoute(stream="orders")
    order_id: int


# As other extensions of Flask: made at import, started by the factory. Commands such as `flask routes` call the
# factory, too: a broker that is down must not stop them.
brokers = connect_blocking(required=False)


def create_app() -> Flask:
    """The app, connected. The connections are closed when the interpreter exits."""
    app = Flask(__name__)
    brokers.start()
    app.add_url_rule("/orders/<int:order_id>", view_func=place_order, methods=["POST"])
    app.register_error_handler(DeliveryError, not_delivered)
    return app


def place_order(order_id: int) -> tuple[dict[str, int], int]:
    """Answered with 201 once the broker has the event."""
    brokers.emitter.emit(OrderPlaced(order_id=order_id))
    return {"order_id": order_id}, 201


def not_delivered(error: DeliveryError) -> tuple[dict[str, str], int, dict[str, str]]:
    """The client may try again."""
    return {"detail": "try again in a moment"}, 503, {"Retry-After": "1"}
