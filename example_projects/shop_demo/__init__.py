"""What the FastAPI and the Django example share, and no app of yours needs: the live page, and what `make demo` starts.

`live/` is the page with its consumers; `transports.py` lets one event travel through four brokers; `brokers.py`,
`visitor.py` and `run.py` are the demo: a broker, a first visitor, a server.
"""
