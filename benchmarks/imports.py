"""What `import dispytch_integrations` costs beyond pydantic and asyncio, which every such app imports anyway."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys

from benchmarks.harness import Row

_MEASURE = """
import asyncio, pydantic, time
class Model(pydantic.BaseModel): x: int
started = time.perf_counter()
import dispytch_integrations
print((time.perf_counter() - started) * 1e3)
"""


def _milliseconds() -> float:
    # Byte code is cached wherever a package is installed; an environment that forbids it measures the compiler.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    finished = subprocess.run(
        [sys.executable, "-c", _MEASURE], capture_output=True, text=True, check=True, env=environment
    )
    return float(finished.stdout)


async def run() -> list[Row]:
    """The median of some processes, with byte code cached."""
    _milliseconds()
    measured = statistics.median(_milliseconds() for _ in range(15))
    what = "import dispytch_integrations, beyond pydantic and asyncio"
    return [Row(what=what, measured=measured, unit="ms", reach="<= 15")]
