"""What production costs: tracing switched on and off, health checks of healthy brokers, the pytest plugin unused."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from opentelemetry import propagate, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.trace import SpanKind

from benchmarks.emitter import UserCreated, microseconds
from benchmarks.harness import Row
from dispytch_integrations import connect
from dispytch_integrations.health import HealthCheck
from dispytch_integrations.hooks import Hook
from dispytch_integrations.message import Message
from dispytch_integrations.opentelemetry import OpenTelemetryHook
from tests.support.brokers import Redis, Tansu

__all__ = ["run"]

RUNS = 12


async def _confirmed(messages: Sequence[Message], *, timeout: float | None = None) -> list[Exception | None]:
    return [None] * len(messages)


async def run() -> list[Row]:
    """Tracing, health, the plugin."""
    return [*await _tracing(), *await _health(), _plugin()]


async def _tracing() -> list[Row]:
    created = UserCreated(user_id="abc", value=3)
    hooks: dict[str, list[Any]] = {
        "no": [],
        "tracing": [OpenTelemetryHook(tracer_provider=_recording())],
        "both": [
            OpenTelemetryHook(tracer_provider=_recording(), meter_provider=MeterProvider([InMemoryMetricReader()]))
        ],
        "sdk": [_SDKAlone(_recording())],
        "nothing": [OpenTelemetryHook()],
        "off": [],
    }
    times: dict[str, float] = {}
    for name, given in hooks.items():
        async with connect("memory://kafka", hooks=given) as emitter:
            setattr(emitter.producer, "deliver", _confirmed)  # noqa: B010
            times[name] = await microseconds(lambda emitter=emitter: emitter.emit(created))  # type: ignore[misc]
    told = (
        ("tracing", "tracing on (SDK, all sampled)", "<= 15"),
        ("sdk", "of it the SDK's span and propagator alone", ""),
        ("both", "tracing and metrics on", ""),
        ("nothing", "instrumented, no SDK configured", ""),
        ("off", "installed, not instrumented", "<= 1"),
    )
    return [
        Row(
            what=f"OpenTelemetry: {what}, added to an emit",
            measured=times[name] - times["no"],
            unit="us",
            reach=reach,
            note=f"an emit without takes {times['no']:.1f} us",
        )
        for name, what, reach in told
    ]


class _SDKAlone(Hook):
    """What no instrumentation can do without: a span with as many attributes, and its context in the headers."""

    def __init__(self, provider: TracerProvider) -> None:
        self._start = provider.get_tracer("benchmark").start_span
        self._attributes = {f"messaging.attribute.{number}": "a value" for number in range(5)}

    def before_send(self, message: Message) -> None:
        message.trace = span = self._start("send users", kind=SpanKind.PRODUCER, attributes=self._attributes)
        propagate.inject(message.headers, trace.set_span_in_context(span))

    def sent(self, message: Message) -> None:
        message.trace.end()


def _recording() -> TracerProvider:
    tracers = TracerProvider()
    tracers.add_span_processor(SpanProcessor())  # What an exporter does is on a thread of its own.
    return tracers


async def _health() -> list[Row]:
    with ExitStack() as stack:
        brokers = {"kafka": stack.enter_context(Tansu()).url, "redis": stack.enter_context(Redis()).url}
        rows: list[Row] = []
        for name, url in brokers.items():
            async with connect(url) as emitter:
                check = HealthCheck(ready_on="broker")
                times: list[float] = []
                for _ in range(200):
                    started = time.perf_counter()
                    assert (await check(emitter)).ready
                    times.append((time.perf_counter() - started) * 1000)
            rows.append(
                Row(
                    what=f"/health/ready, a healthy {name}, without the web framework: median",
                    measured=statistics.median(times),
                    unit="ms",
                    reach="<= 5",
                    note=f"the slowest {max(times):.1f} ms",
                )
            )
        return rows


def _plugin() -> Row:
    """A run of pytest with one test that does not use it, with the plugin and without."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "pytest.ini").write_text("[pytest]\n")
        Path(folder, "test_nothing.py").write_text("def test_nothing(): ...\n")
        others = ("django", "asyncio", "hypothesispytest", "xdist", "timeout", "anyio", "cacheprovider")
        base = [sys.executable, "-m", "pytest", "-q", *(f"-pno:{name}" for name in others)]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}

        def seconds(*more: str) -> float:
            started = time.perf_counter()
            subprocess.run([*base, *more], cwd=folder, env=environment, check=True, capture_output=True)
            return time.perf_counter() - started

        seconds()  # Byte code.
        extra = [seconds() - seconds("-pno:dispytch") for _ in range(RUNS)]
    return Row(
        what="pytest plugin, a run that does not use it: added",
        measured=statistics.median(extra) * 1000,
        unit="ms",
        reach="<= 50",
    )
