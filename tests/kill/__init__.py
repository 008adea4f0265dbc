"""Trying to lose an event: writers and relays as processes, killed, stopped and cut off at random moments.

programs.py   what the processes run
places.py     databases and brokers, behind proxies that break connections
arena.py      the faults, and what must be true in spite of them
__main__.py   `make test-kill`
"""
