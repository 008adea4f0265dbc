"""Imported once by the server that forks the processes: a new one is there within milliseconds."""

from importlib import import_module

for _name in (
    "aio_pika",
    "aiokafka",
    "aiosqlite",
    "asyncmy",
    "asyncpg",
    "psycopg",
    "pymysql",
    "redis.asyncio",
    "tests.kill.programs",
):
    import_module(_name)
