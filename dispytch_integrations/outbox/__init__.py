"""The transactional outbox: events stored in the transaction that made them true, and relayed to the broker.

    record.py   a message as a row
    store.py    what a database must implement; third parties may add one
    leases.py   which relay has which shards
    options.py  how a relay works
    relay.py    from the rows to the broker, at least once and in order per key

Django's outbox is the app `dispytch_integrations.django.outbox`, SQLAlchemy's is
`dispytch_integrations.sqlalchemy.SQLAlchemyOutbox`.
"""

from dispytch_integrations.outbox.options import RelayOptions
from dispytch_integrations.outbox.record import Codec
from dispytch_integrations.outbox.relay import Relay
from dispytch_integrations.outbox.store import OutboxStore, Selection, State, Stats

__all__ = ["Codec", "OutboxStore", "Relay", "RelayOptions", "Selection", "State", "Stats"]
