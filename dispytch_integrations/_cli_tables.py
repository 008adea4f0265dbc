"""The commands check, emit, tail and catalog of both command lines: their arguments, options and help.

Nothing heavy is imported here: `--help` answers at once.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from dispytch_integrations._cli_options import Argument, Option, above_zero, whole

__all__ = [
    "BROKERS",
    "CATALOG",
    "CHECK",
    "DIFF",
    "EMIT",
    "EVENTS",
    "TAIL",
    "Table",
    "assignment",
    "header",
    "with_examples",
]


@dataclass(frozen=True, slots=True)
class Table:
    """One command. `arguments` and `more_options` are those of `dispytch-integrations` alone: in a Django project the
    settings say where the brokers are, and the apps which events there are."""

    help: str
    options: tuple[Option, ...]
    arguments: tuple[Argument, ...] = ()
    more_options: tuple[Option, ...] = ()
    notes: tuple[str, ...] = ()
    """Paragraphs below the help: exit codes, fields of JSON."""
    examples: tuple[str, ...] = ()
    """Lines, without the name of the program."""

    @property
    def short(self) -> str:
        """The help in a list of commands: up to its first colon or full stop."""
        return re.split(r"[:.] ", self.help)[0].rstrip(".") + "."


def with_examples(table: Table, program: str, examples: Sequence[str] | None = None) -> tuple[str, ...]:
    """The paragraphs below a command's help. `examples`: instead of the table's."""
    lines = "".join(f"  {program} {line}\n" for line in (table.examples if examples is None else examples))
    return (f"examples:\n{lines}", *table.notes)


def header(text: str) -> tuple[str, str]:
    """NAME=VALUE. Raises ValueError."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ValueError(f"--header takes NAME=VALUE, not {text!r}")
    return name, value


def assignment(text: str) -> tuple[str, str]:
    """FIELD=VALUE. Raises ValueError."""
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise ValueError(f"--filter takes FIELD=VALUE, as in order_id=7 or type=shop.*, not {text!r}")
    return name.strip(), value


BROKERS = (
    Option("--broker-url", "Where it goes (default: DISPYTCH_URL); several: alias=URL.", str, "[ALIAS=]URL", many=True),
)
"""Where events go, for who has no settings."""

CHECK = Table(
    help="Ask brokers whether they can be used: connect to each once, and say what it is, or what is wrong.",
    arguments=(
        Argument("urls", "Brokers, as kafka://h:9092 or alias=URL; none: DISPYTCH_URL.", "[URL]...", True, many=True),
    ),
    options=(
        Option("--timeout", "Seconds for each broker; all are asked at once (default: 5).", above_zero, "SECONDS"),
        Option("--json", "One JSON array.", None),
    ),
    notes=(
        """exit codes:
  0  all can be used
  1  one or more do not answer
  2  a setting is wrong: an option, a password, a certificate, a URL
""",
        """with --json, one object per broker:
  alias, address, transport, state (up, down, wrong), server (its name), version (null: it does not tell),
  details, milliseconds (of one question and its answer), error
""",
    ),
    examples=(
        "check kafka://localhost:9092 redis://localhost:6379",
        "check --json | jq '.[] | select(.state != \"up\")'",
    ),
)

_EMIT_JSON = """with --json, one object per event:
  id, type, sent (false: a dry run), broker, address, destination, key, properties, headers, body; with --lines
  one object at the end: sent, seconds
"""
_EMIT_OPTIONS = (
    Option("--header", "A header; may be repeated.", header, "NAME=VALUE", many=True),
    Option("--lines", "Standard input has one event per line.", None),
    Option("--dry-run", "Show the message: broker, route, key, headers, body. Connects to nothing.", None),
    Option("--json", "Print JSON.", None),
)

EMIT = Table(
    help="Emit an event: its class, and its fields as JSON, which are validated before.",
    arguments=(
        Argument("event", "The class, as shop.events:OrderPlaced.", "MODULE:EVENT"),
        Argument("fields", "Its fields as JSON; -: from standard input.", "[JSON]", True),
    ),
    options=_EMIT_OPTIONS,
    more_options=BROKERS,
    notes=(
        """exit codes:
  0  the broker has confirmed it, or it was shown
  1  it was not delivered
  2  a wrong field, event, option or setting: nothing was sent
""",
        _EMIT_JSON,
    ),
    examples=(
        "emit shop.events:OrderPlaced '{\"order_id\": 7}' --broker-url kafka://localhost:9092",
        "emit shop.events:OrderPlaced '{\"order_id\": 7}' --dry-run",
        "emit shop.events:OrderPlaced --lines < orders.jsonl",
    ),
)

TAIL = Table(
    help="Show events as they arrive, until Ctrl-C. Takes nothing away from consumers, and leaves no queue or group.",
    arguments=(
        Argument("url", "The broker.", "URL"),
        Argument("name", "Topic, exchange, stream or channel; Redis: a pattern of channels, too.", "NAME"),
    ),
    options=(
        Option(
            "--filter",
            "Of the body: order_id=7, customer.city=Bonn; type=shop.*, id=, key=, headers.NAME=. Repeated: all hold.",
            assignment,
            "FIELD=VALUE",
            many=True,
        ),
        Option("--count", "End after N events.", whole, "N"),
        Option("--from-beginning", "First what is there already (Kafka topics, Redis streams).", None),
        Option("--routing-key", "RabbitMQ: which ones, as orders.# (default for a topic exchange: #).", str, "PATTERN"),
        Option("--stream", "Redis: NAME is a stream (default: what is there by that name, else a channel).", None),
        Option("--channel", "Redis: NAME is a channel.", None),
        Option("--wait", "Wait for a broker or NAME that is not there yet, instead of ending.", None),
        Option("--json", "One JSON object per line.", None),
    ),
    notes=(
        """exit codes:
  0  stopped as asked: Ctrl-C, SIGTERM, --count reached, or nobody reads the output any more
  2  a wrong option or setting; there is no such topic, exchange or stream
  3  the broker does not answer (at the start; a connection that is lost later is made again)
""",
        """with --json, one object per event:
  time (when it was emitted, else when it came), id, type, source (null: no CloudEvents headers), transport,
  destination, position (partition and offset, routing key, entry), key, headers, content_type, body,
  encoding of the body (json, msgpack, text, base64; null: a tombstone), size in bytes (null: a tombstone)
""",
    ),
    examples=(
        "tail kafka://localhost:9092 orders --from-beginning",
        "tail rabbitmq://localhost user.events --routing-key 'user.#' --filter type=shop.*",
        "tail redis://localhost orders --json --count 1 | jq .body",
    ),
)

EVENTS = Table(
    help="List the project's event classes and where they go.",
    options=(Option("--json", "Print JSON.", None),),
    notes=("exit codes:\n  0  they were listed\n",),
    examples=("events",),
)

_OUTPUT = Option("--output", "Write the document to this file: .yaml, or else JSON.", str, "FILE", short="-o")

CATALOG = Table(
    help="List the events of an app: as a table, as an AsyncAPI 3.0 document, or as a page for people.",
    arguments=(
        Argument("app", "An app, and all events that come with it: shop.main:app; or a module.", "MODULE[:APP]"),
    ),
    options=(
        Option("--json", "The document as JSON.", None),
        Option("--yaml", "The document as YAML.", None),
        Option("--html", "Write one self-contained page to this file; -: to standard output.", str, "FILE"),
        _OUTPUT,
        Option("--title", "Its title (default: the app's own, else the package's name).", str, "TEXT"),
        Option("--api-version", "Its version (default: the app's own, else the package's).", str, "TEXT"),
    ),
    more_options=(
        replace(BROKERS[0], help="Servers to describe, not connected to (default: DISPYTCH_URL, else none)."),
    ),
    notes=(
        """exit codes:
  0  it was written
  2  the module cannot be imported, or has no events; a wrong option or setting
""",
    ),
    examples=(
        "catalog shop.main:app",
        "catalog shop.main:app -o events.yaml --html events.html",
        "catalog diff main.yaml branch.yaml",
    ),
)

DIFF = Table(
    help="Tell what has changed between two documents of `catalog`, and what of it breaks consumers.",
    arguments=(Argument("old", "File of the old one.", "OLD"), Argument("new", "File of the new one.", "NEW")),
    options=(Option("--json", "One JSON object per change: breaking, event, where, what.", None),),
    notes=(
        """exit codes:
  0  nothing that breaks a consumer
  1  something does
  2  a file cannot be read, or is no such document
""",
    ),
    examples=(
        "catalog diff main.yaml branch.yaml",
        "catalog diff old.json new.json --json | jq -r .what",
    ),
)
