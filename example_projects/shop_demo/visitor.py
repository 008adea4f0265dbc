"""The first visitor: places a few orders over HTTP, and can check that their events come back."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
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
        deadline = time.monotonic() + timeout
        connection = HTTPConnection(self._host, self._port, timeout=timeout)
        try:
            connection.request("GET", "/live", headers={"Accept": "text/event-stream"})
            arriving = self._messages(connection)
            expected = missing = self.shop(pause=0)
            for message in arriving:
                missing = missing - {(message["topic"], message["body"].get("order_id"))}
                if not missing:
                    return len(expected)
                if connection.sock is not None:
                    connection.sock.settimeout(max(deadline - time.monotonic(), 0.01))
        except TimeoutError:
            pass
        except (OSError, HTTPException) as exc:
            raise VisitorError(f"the app broke off: {type(exc).__name__}: {exc}") from exc
        finally:
            connection.close()
        raise VisitorError(f"the placed events did not all come back from the broker within {timeout:g} s")

    def _messages(self, connection: HTTPConnection) -> Iterator[dict[str, Any]]:
        response = connection.getresponse()
        kind, data = "", ""
        for line in iter(response.readline, b""):
            name, _, value = line.decode().rstrip("\r\n").partition(": ")
            if name == "event":
                kind = value
            elif name == "data":
                data += value
            elif not name:
                if data and kind in ("", "message"):
                    yield json.loads(data)
                kind, data = "", ""

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
