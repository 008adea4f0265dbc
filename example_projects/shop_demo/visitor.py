"""The first visitor: places a few orders over HTTP, and can check that their events come back."""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from http.client import HTTPConnection, HTTPException
from typing import Any

__all__ = ["Visitor", "VisitorError"]

_ORDERS: tuple[dict[str, object], ...] = (
    {"customer": "Ada Lovelace", "product": "Espresso beans", "quantity": 2},
    {"customer": "Grace Hopper", "product": "Pour-over kettle", "quantity": 1},
    {"customer": "Katherine Johnson", "product": "Stoneware mug", "quantity": 4},
)


class VisitorError(Exception):
    """Something did not go as promised; the message says what."""


class Visitor:
    """Talks to the app as a browser does: HTTP and server-sent events, nothing else.

    `follow_ups`: topics on which the shop itself tells something of every order that is not cancelled.
    """

    def __init__(self, host: str, port: int, follow_ups: Sequence[str] = ()) -> None:
        self._host = host
        self._port = port
        self._follow_ups = follow_ups

    def shop(self, pause: float = 0.25) -> set[tuple[str, int]]:
        """Place three orders and cancel one; return what is to come back: (topic, order number).

        `pause`: seconds between two of them. Raises VisitorError when the app refuses.
        """
        numbers: list[int] = []
        for order in _ORDERS:
            numbers.append(int(self._post("/orders", order)["id"]))
            time.sleep(pause)
        self._post(f"/orders/{numbers[-1]}/cancellation", {"reason": "found a nicer one"})
        expected = {("orders.placed", number) for number in numbers}
        expected.add(("orders.cancelled", numbers[-1]))
        expected.update((topic, number) for topic in self._follow_ups for number in numbers[:-1])
        return expected

    def shop_and_watch(self, timeout: float) -> int:
        """Shop with the page's stream open; return how many events came back.

        Raises VisitorError when they did not within `timeout` seconds.
        """
        with self._watching(timeout) as page:
            expected = self.shop(pause=0)
            page.read_until_arrived(expected)
        return len(expected)

    def shop_while_the_relay_is_stopped(self, timeout: float) -> int:
        """Shop with the relay of the outbox stopped, and start it again; return how many events waited meanwhile.

        Where the page has no switch for it: 0. Raises VisitorError when one of them came too early, or not within
        `timeout` seconds.
        """
        with self._watching(timeout) as page:
            if not page.read_whether_the_relay_can_be_stopped():
                return 0
            self._post("/outbox/relay", {"on": False})
            expected = self.shop(pause=0)
            page.read_until_outbox_holds(len(expected), 1000)
            if page.arrived & expected:
                raise VisitorError("an event came back from the broker although the outbox's relay was stopped")
            self._post("/outbox/relay", {"on": True})
            page.read_until_arrived(expected)
            page.read_until_outbox_holds(0, 0)
        return len(expected)

    @contextmanager
    def _watching(self, timeout: float) -> Generator[_Page, None, None]:
        connection = HTTPConnection(self._host, self._port, timeout=timeout)
        try:
            connection.request("GET", "/live", headers={"Accept": "text/event-stream"})
            yield _Page(connection, timeout)
        except TimeoutError:
            raise VisitorError(
                f"the placed events did not all come back from the broker within {timeout:g} s"
            ) from None
        except (OSError, HTTPException) as exc:
            raise VisitorError(f"the app broke off: {type(exc).__name__}: {exc}") from exc
        finally:
            connection.close()

    def _post(self, path: str, body: dict[str, object]) -> dict[str, Any]:
        connection = HTTPConnection(self._host, self._port, timeout=15)
        try:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            answer: dict[str, Any] = {}
            with suppress(ValueError):
                answer = json.loads(response.read())
            if response.status >= 400:
                raise VisitorError(f"POST {path} was answered {response.status}: {answer.get('detail', '')}")
            return answer
        except (OSError, HTTPException) as exc:
            raise VisitorError(f"POST {path} was not answered: {type(exc).__name__}") from exc
        finally:
            connection.close()


class _Page:
    """The page's stream, as far as it has been read."""

    def __init__(self, connection: HTTPConnection, timeout: float) -> None:
        self.arrived: set[tuple[str, int]] = set()
        self._connection = connection
        self._response = connection.getresponse()
        self._deadline = time.monotonic() + timeout
        self._waiting = -1
        self._stoppable = False
        # Up to its first message: what is placed from now on is seen.
        self._read()

    def read_until_arrived(self, expected: set[tuple[str, int]]) -> None:
        """Raises TimeoutError; VisitorError where the stream ends."""
        while expected - self.arrived:
            self._read()

    def read_whether_the_relay_can_be_stopped(self) -> bool:
        """Raises TimeoutError; VisitorError where the stream ends."""
        while self._waiting < 0:
            self._read()
        return self._stoppable

    def read_until_outbox_holds(self, least: int, most: int) -> None:
        """How many events. Raises TimeoutError; VisitorError where the stream ends."""
        while not least <= self._waiting <= most:
            self._read()

    def _read(self) -> None:
        """One message."""
        kind, data = "message", ""
        if self._connection.sock is not None:
            self._connection.sock.settimeout(max(self._deadline - time.monotonic(), 0.01))
        for line in iter(self._response.readline, b""):
            name, _, value = line.decode().rstrip("\r\n").partition(": ")
            if name == "event":
                kind = value
            elif name == "data":
                data += value
            elif not name and data:
                message = json.loads(data)
                if kind == "outbox":
                    self._waiting, self._stoppable = message["waiting"], message["relaying"] is not None
                elif kind == "message":
                    self.arrived.add((message["topic"], message["body"].get("order_id")))
                return
        raise VisitorError("the page's stream ended")
