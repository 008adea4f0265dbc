"""Open and close the project's brokers by hand: in a server's hooks, and in workers of other kinds.

    # gunicorn.conf.py: connect when the worker starts, not at its first event
    def post_worker_init(worker):
        from dispytch_integrations.django.lifecycle import open_brokers
        open_brokers()

Nothing has to be called for events to arrive: brokers are opened at their first use in a process, and closed when the
process ends by itself. These functions are for processes that end otherwise, and for who wants to know at start.
"""

from __future__ import annotations

from dispytch_integrations.django._connections import connections

__all__ = ["close_brokers", "flush_events", "open_brokers"]


def open_brokers() -> None:
    """Connect this process to the brokers of DISPYTCH, and wait for it. Counted: close as often as you open.

    Raises SettingsError with all that is wrong; StartupError when a broker was not reached within its STARTUP_TIMEOUT
    (unless its REQUIRED is False).
    """
    connections.open()


def close_brokers() -> None:
    """Refuse new events, wait for those in flight (SHUTDOWN_TIMEOUT, default 10 s), and close the connections.

    What was abandoned is logged with its number. Harmless when nothing is open.
    """
    connections.close()


def flush_events(timeout: float | None = None) -> bool:
    """Wait until the events of committed transactions are confirmed, or have failed, and signals were received.

    `timeout`: seconds; None: SHUTDOWN_TIMEOUT. Returns False when some still wait.
    """
    return connections.flush(timeout)
