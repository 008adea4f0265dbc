"""A Django project whose orders are told to the world in events.

Where to look first: `orders/events.py` (what is told), `orders/services.py`, `orders/signals.py` and `orders/tasks.py`
(where it is told), `shop/settings.py` and `shop/asgi.py` (how it is connected). `live/` is the page that shows the
events as they come back from the broker; `demo/` is what `make demo-django` runs.

    python example_projects/django_orders/manage.py migrate
    uvicorn example_projects.django_orders.shop.asgi:application

OUTBOX=1 stores events with what they tell of, and relays them: see `shop/settings.py`, and the outbox in the admin.
DISPYTCH_URL, DATABASE_URL and CELERY_BROKER_URL name a broker, a database, and a broker for Celery; without them it is
memory, SQLite, and tasks that run where they are asked for.
"""
