"""One file per framework, each a whole app to run and to copy from; docs/frameworks.md explains them.

The broker is that of DISPYTCH_URL, in the files' docstrings a Redis: its streams are there when an event comes.
"""
