"""The same shop with a database and the outbox: `OUTBOX=1`.

An order and its event are committed in one transaction, or neither is. The broker may be away: orders are taken all
the same, and their events go out when it is back. Five lines make it so:

    outbox_tables(Base.metadata)               # tables.py: two tables, migrated like your own
    outbox = SQLAlchemyOutbox(engine)          # database.py
    bind(Session, outbox)                      # database.py: what its sessions commit is stored with it
    emitter_lifespan(url, outbox=outbox)       # app.py: connects, and relays what was committed
    emit_on_commit(session, OrderPlaced(...))  # services.py: next to the change that it tells of

`routes.py` shows whose commit comes before the answer.
"""
