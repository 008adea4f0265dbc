"""The admin, in Django's own way: a TestCase with the mixin that collects events."""

from __future__ import annotations

from django.contrib.auth.models import User
from django.core.management import call_command
from django.test import TestCase, override_settings

from dispytch_integrations.django.testing import EmittedEventsMixin
from example_projects.django_orders.orders.events import OrderCancelled, OrderPlaced
from example_projects.django_orders.orders.models import Order


class AdminTests(EmittedEventsMixin, TestCase):
    def setUp(self) -> None:
        self.client.force_login(User.objects.create_superuser("admin"))

    def test_an_order_placed_in_the_admin_is_told(self) -> None:
        """The shop on the telephone is no second class: same price, same event."""
        inline = {"cancellation-TOTAL_FORMS": 0, "cancellation-INITIAL_FORMS": 0}
        with self.captureOnCommitCallbacks(execute=True):
            answer = self.client.post(
                "/admin/orders/order/add/", {"customer": "Ada", "product": "Paper filters", "quantity": 2, **inline}
            )

        self.assertRedirects(answer, "/admin/orders/order/")
        placed = self.emitted_events.assert_emitted(OrderPlaced, customer="Ada")
        assert str(placed.total) == "13.80"

    def test_orders_cancelled_in_the_admin_are_told(self) -> None:
        """The action takes many orders, and each has its event; what was cancelled before has none."""
        orders = [Order.objects.create(customer="Ada", product="Paper filters", total=1) for _ in range(3)]
        chosen = {"action": "cancel", "_selected_action": [order.pk for order in orders[:2]]}
        for _ in range(2):
            with self.captureOnCommitCallbacks(execute=True):
                self.client.post("/admin/orders/order/", chosen)

        told = [event for event in self.emitted_events if isinstance(event, OrderCancelled)]
        assert {event.order_id for event in told} == {order.pk for order in orders[:2]}
        assert len(told) == 2

    def test_pages_of_the_admin_work(self) -> None:
        """Lists, and the form of an order: what is looked at in the demo."""
        order = Order.objects.create(customer="Ada", product="Paper filters", total=1)
        for page in ("", "orders/order/", f"orders/order/{order.pk}/change/", "orders/failedevent/"):
            assert self.client.get(f"/admin/{page}").status_code == 200

    @override_settings(DEBUG=True)
    def test_project_is_complete(self) -> None:
        """Nothing for `check` to say on a laptop, and no migration forgotten."""
        call_command("check", fail_level="WARNING")
        call_command("makemigrations", check=True, dry_run=True, verbosity=0)
