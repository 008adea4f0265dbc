"""The transactional outbox: events stored in the transaction that made them true, and relayed to the broker.

    record.py   a message as a row
    store.py    what a database must implement; third parties may add one
    relay.py    from the rows to the broker, at least once and in order per key

Django's outbox is the app `dispytch_integrations.django.outbox`, SQLAlchemy's is `SQLAlchemyOutbox`.
"""
