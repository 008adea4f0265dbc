"""Django's outbox: events are stored in the transaction that made them true, and relayed to the broker.

    INSTALLED_APPS += ["dispytch_integrations.django", "dispytch_integrations.django.outbox"]

    $ python manage.py migrate
    $ python manage.py dispytch relay

`emit_on_commit` and `@emits` store their events from then on; nothing changes where they are called. The setting
DISPYTCH_OUTBOX is described in `conf.py`.
"""

__all__: list[str] = []
