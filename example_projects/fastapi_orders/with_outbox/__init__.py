"""The same shop with a database and the outbox: `OUTBOX=1`.

An order and its event are committed in one transaction, or neither is. The broker may be away: orders are taken all
the same, and their events go out when it is back. Where to look first: `services.py` (what is stored), `database.py`
(how it is connected), `routes.py` (whose commit comes before the answer).
"""
