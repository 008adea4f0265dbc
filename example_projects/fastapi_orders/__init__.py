"""A shop that takes orders over HTTP and tells the world about them in events.

Where to look first: `events.py` (what is told), `services.py` (where it is told), `app.py` (how it is connected).
`with_outbox/` is the same shop with a database, whose events are committed with its orders: `OUTBOX=1`.
`routers/live.py` shows the events in a page as they come back from the broker; `demo.py` is what `make demo` runs.
"""
