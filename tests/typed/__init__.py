"""What a user's type checker sees of the public names: read by mypy and pyright in `make check`, never run.

A line with `type: ignore[...]` is a mistake that both must find: when either of them no longer does, it reports the
comment as unnecessary.
"""
