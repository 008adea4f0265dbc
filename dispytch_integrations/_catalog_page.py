"""The event catalogue as a page for people: one HTML file that asks the network for nothing.

    Path("events.html").write_text(render(describe("shop.events")), encoding="utf-8")

Its parts are in the folder `_catalog`: the frame, the style, and the scripts that read the document and show it.
"""

from __future__ import annotations

import json
import math
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from hashlib import sha256
from html import escape
from importlib.resources import files
from string import Template
from typing import Any, cast

__all__ = ["policy", "render"]

_SCRIPTS = ("model.js", "code.js", "view.js", "main.js")
"""In one scope, in this order."""


def render(document: Mapping[str, Any], *, served: bool = False) -> str:
    """The page of an AsyncAPI 3.0 document, such as `describe` makes: whole, to be written to a file or sent.

    `served`: `asyncapi.json` and `asyncapi.yaml` are there, below the page's own path, and it links to them; False: it
    gives the document from what is in the page.

    Nothing of the document can become markup or a script: the policy of the page allows its own script alone.
    """
    info = _mapping(document.get("info"))
    found = list(_messages(document))
    return _template("page.html").substitute(
        policy=escape(policy()),
        title=_text(info.get("title") or "Events"),
        version=_text(info.get("version") or ""),
        early=_part("early.js"),
        style=_part("page.css"),
        script=_script(),
        served="true" if served else "false",
        count=f"{len(found)} event{'' if len(found) == 1 else 's'}",
        events="\n".join(_listed(found)),
        document=_embedded(document),
    )


@cache
def policy() -> str:
    """The page's Content-Security-Policy: its own style and scripts by their hashes, and nothing else."""
    scripts = " ".join(_hash(text) for text in (_part("early.js"), _script()))
    return (
        f"default-src 'none'; script-src {scripts}; style-src {_hash(_part('page.css'))}; img-src data:; "
        f"base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    return f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"


@cache
def _part(name: str) -> str:
    return files("dispytch_integrations").joinpath("_catalog", name).read_text(encoding="utf-8")


@cache
def _template(name: str) -> Template:
    return Template(_part(name))


@cache
def _script() -> str:
    return '"use strict";\n(() => {\n' + "\n".join(_part(name) for name in _SCRIPTS) + "})();\n"


# -- the document within the page ----------------------------------------------------------------------------------


def _embedded(document: Mapping[str, Any]) -> str:
    """The document as JSON that no `</script>` in a text can end, and that every browser reads."""
    try:
        text = json.dumps(document, separators=(",", ":"), allow_nan=False)
    except ValueError:
        text = json.dumps(_finite(document), separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _finite(value: Any) -> Any:
    """The same with text for the numbers that JSON does not have."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in cast("Mapping[str, Any]", value).items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in cast("Sequence[Any]", value)]
    return value


# -- without JavaScript --------------------------------------------------------------------------------------------


def _listed(found: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> Iterator[str]:
    if not found:
        return
    yield "<ul>"
    for message, channel in found:
        name = message.get("title") or message.get("name") or "event"
        about = message.get("summary") or str(message.get("description") or "").split("\n\n")[0]
        where = channel.get("title") or channel.get("address") or ""
        yield (
            f"<li><b>{_text(name)}</b> <code>{_text(message.get('name') or '')}</code>"
            f"{' → ' if where else ''}<code>{_text(where)}</code><br>{_text(about)}</li>"
        )
    yield "</ul>"


def _messages(document: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Every message with the channel it is in; those of no channel last, with an empty one."""
    seen: set[int] = set()
    for each in _mapping(document.get("channels")).values():
        channel = _followed(document, each)
        for entry in _mapping(channel.get("messages")).values():
            message = _followed(document, entry)
            if id(message) not in seen:
                seen.add(id(message))
                yield message, channel
    for entry in _mapping(_mapping(document.get("components")).get("messages")).values():
        message = _followed(document, entry)
        if id(message) not in seen:
            yield message, {}


def _followed(document: Mapping[str, Any], value: Any) -> Mapping[str, Any]:
    """What a chain of references ends at."""
    for _ in range(20):
        reference = _mapping(value).get("$ref")
        if not isinstance(reference, str):
            break
        value = document
        for part in reference.split("/")[1:]:
            value = _mapping(value).get(part.replace("~1", "/").replace("~0", "~"))
    return _mapping(value)


def _mapping(value: Any) -> Mapping[str, Any]:
    return cast("Mapping[str, Any]", value) if isinstance(value, Mapping) else {}


def _text(value: object) -> str:
    """As HTML; half of a surrogate pair, which no file can hold, becomes a question mark."""
    return escape(str(value).encode("utf-8", "replace").decode())
