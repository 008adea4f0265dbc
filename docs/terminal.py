"""Takes the picture of a terminal session, with real commands and a real broker: `make pictures`."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from dispytch_integrations.testing.brokers import Tansu  # noqa: E402

URL = "kafka://localhost:9092"
WIDTH = 100
EVENTS = """
from dispytch_integrations import EventBase
from dispytch_integrations.kafka import KafkaEventRoute

class OrderPlaced(EventBase):
    __route__ = KafkaEventRoute(topic="orders")
    __event_type__ = "com.shop.order.placed"
    __ordering_key__ = "{order_id}"
    order_id: int
    customer: str
"""
PREPARE = [
    f'dispytch-integrations emit events:OrderPlaced \'{{"order_id": {number}, "customer": "{name}"}}\' '
    f"--broker-url {URL} --header tenant=acme"
    for number, name in ((7, "ada"), (8, "grace"))
]
SESSION = [
    f"dispytch-integrations check {URL} redis://localhost:6399",
    f"dispytch-integrations tail {URL} orders --from-beginning --count 2",
    'dispytch-integrations emit events:OrderPlaced \'{"order_id": "nine"}\' --dry-run',
]
THEME = TerminalTheme(
    (15, 23, 42),
    (226, 232, 240),
    [
        (51, 65, 85),
        (248, 113, 113),
        (74, 222, 128),
        (250, 204, 21),
        (96, 165, 250),
        (192, 132, 252),
        (45, 212, 191),
        (226, 232, 240),
    ],
)


def main() -> None:
    """Run the session, and draw what it has printed."""
    console = Console(
        record=True, width=WIDTH, file=open(os.devnull, "w"), force_terminal=True
    )
    with Tansu() as broker, tempfile.TemporaryDirectory() as folder:
        Path(folder, "events.py").write_text(EVENTS)

        def run(command: str) -> str:
            words = shlex.split(command.replace(URL, broker.url))
            done = subprocess.run(
                [str(Path(sys.executable).parent / words[0]), *words[1:]],
                cwd=folder,
                env={
                    **os.environ,
                    "FORCE_COLOR": "1",
                    "COLUMNS": str(WIDTH),
                    "PYTHONPATH": str(HERE.parent),
                },
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=60,
                check=False,
            )
            return re.sub(
                r"127\.0\.0\.1:\d{4,5}(?=\D)(?<!6399)", "localhost:9092", done.stdout
            )

        for command in PREPARE:
            run(command)
        for command in SESSION:
            console.print(Text("$ ", style="bold green") + Text(command, style="bold"))
            console.print(Text.from_ansi(run(command).rstrip()))
            console.print()
    picture = console.export_svg(title="dispytch-integrations", theme=THEME)
    # Its font would be loaded from elsewhere.
    picture = re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.DOTALL)
    picture = picture.replace(
        "Fira Code, monospace",
        "ui-monospace, SFMono-Regular, Menlo, Consolas, monospace",
    )
    (HERE / "images" / "terminal.svg").write_text(picture)


if __name__ == "__main__":
    main()
