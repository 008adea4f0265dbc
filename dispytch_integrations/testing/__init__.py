"""Tests see the events, without a broker: one set of tools for FastAPI, Starlette, Django, SQLAlchemy and plain code.

    def test_an_order_is_announced(emitted_events):         # a fixture of pytest, found by itself
        place_order(17)
        emitted_events.assert_emitted(OrderPlaced, order_id=17)

    with capture_events() as events:                        # the same for unittest, and anywhere
        place_order(17)
    events.assert_emitted(OrderPlaced, order_id=17)

`override_brokers("memory")` puts every broker on memory for as long as you like, a whole run for example.
`asgi_client(app)` is an httpx client whose app runs its lifespan. `dispytch_integrations.testing.producer_contract` and
`.outbox_contract` hold the tests that producers and outbox stores of your own should pass.
"""

from __future__ import annotations

from dispytch_integrations.testing._asgi import asgi_client
from dispytch_integrations.testing._brokers import capture_events, override_brokers
from dispytch_integrations.testing._events import EmittedEvents

__all__ = ["EmittedEvents", "asgi_client", "capture_events", "override_brokers"]
