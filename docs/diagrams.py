"""Draws the sequences in docs/diagrams as pictures: `make pictures`.

The first line of a file is what the picture tells, for who does not see it; the second
names who takes part, from left to right. Then, one step a line:

    your code -> broker: what is said           --> is an answer
    note your code: what somebody does
    danger: what is lost when it ends here      safe: what is not
"""

from __future__ import annotations

import re
from html import escape
from pathlib import Path
from textwrap import wrap

__all__ = ["draw"]

HERE = Path(__file__).parent
WIDTH, MARGIN, HEAD, LINE = 720, 20, 58, 17
CHARACTERS = 7.1
"""Width of one character of a text, about, in pixels."""
INK, QUIET, RULE, GREEN, RED, BLUE = (
    "#0f172a",
    "#475569",
    "#cbd5e1",
    "#15803d",
    "#b91c1c",
    "#1d4ed8",
)
BANDS = {"danger": ("#fef2f2", RED, "✗"), "safe": ("#f0fdf4", GREEN, "✓")}
STEP = re.compile(r"(?P<who>.+?) (?P<arrow>--?>) (?P<whom>.+?): (?P<text>.+)")
NOTE = re.compile(r"note (?P<who>.+?): (?P<text>.+)")


def draw(source: str) -> str:
    """The picture of a sequence, as SVG. Raises ValueError for a line that is none."""
    title, heads, *lines = [
        line.strip() for line in source.splitlines() if line.strip()
    ]
    names = [name.strip() for name in heads.split("|")]
    pitch = (WIDTH - 2 * MARGIN) / len(names)
    at = {name: MARGIN + pitch * (index + 0.5) for index, name in enumerate(names)}
    body: list[str] = []
    y = HEAD + 22.0
    for line in lines:
        drawn, y = _line(line, at, y)
        body += drawn
    height = y + 6
    parts = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" role="img" '
            f'aria-label="{escape(title)}" '
            'font-family="system-ui, -apple-system, \'Segoe UI\', Helvetica, Arial, sans-serif" font-size="13">'
        ),
        f"<title>{escape(title)}</title>",
        f"<defs>{_marker('ink', QUIET)}{_marker('green', GREEN)}</defs>",
        f'<rect width="{WIDTH}" height="{height:.0f}" rx="12" fill="#f8fafc"/>',
    ]
    for name, x in at.items():
        width = len(name) * 8.2 + 28
        parts += [
            f'<path d="M{x:.0f} {HEAD - 8}V{height - 14:.0f}" stroke="{RULE}" stroke-width="1.5"/>',
            f'<rect x="{x - width / 2:.0f}" y="18" width="{width:.0f}" height="32" rx="8" fill="#fff" stroke="{RULE}"/>',
            f'<text x="{x:.0f}" y="39" text-anchor="middle" font-weight="600" fill="{INK}">{escape(name)}</text>',
        ]
    return "\n".join([*parts, *body, "</svg>"]) + "\n"


def _line(line: str, at: dict[str, float], y: float) -> tuple[list[str], float]:
    """What a line draws from `y` on, and where the next one begins."""
    kind, colon, text = line.partition(": ")
    if colon and kind in BANDS:
        fill, ink, sign = BANDS[kind]
        return [
            (
                f'<rect x="{MARGIN}" y="{y:.0f}" width="{WIDTH - 2 * MARGIN}" height="28" rx="6" fill="{fill}" '
                f'stroke="{ink}" stroke-dasharray="4 4"/>'
            ),
            f'<text x="{WIDTH / 2:.0f}" y="{y + 19:.0f}" text-anchor="middle" fill="{ink}">{sign} {escape(text)}</text>',
        ], y + 44
    if (note := NOTE.fullmatch(line)) is not None and note["who"] in at:
        x, width = at[note["who"]], len(note["text"]) * CHARACTERS + 24
        left = max(x - width / 2, MARGIN)
        return [
            f'<rect x="{left:.0f}" y="{y:.0f}" width="{width:.0f}" height="28" rx="6" fill="#eff6ff" stroke="{BLUE}"/>',
            (
                f'<text x="{left + width / 2:.0f}" y="{y + 19:.0f}" text-anchor="middle" fill="#1e3a8a">'
                f"{escape(note['text'])}</text>"
            ),
        ], y + 44
    step = STEP.fullmatch(line)
    if step is None or step["who"] not in at or step["whom"] not in at:
        raise ValueError(f"{line!r} is no step between {', '.join(at)}")
    start, end = at[step["who"]], at[step["whom"]]
    answer = step["arrow"] == "-->"
    color, marker, dash = (
        (GREEN, "green", ' stroke-dasharray="6 4"') if answer else (QUIET, "ink", "")
    )
    texts = wrap(step["text"], max(int(abs(end - start) / CHARACTERS) - 1, 18))
    drawn = [
        f'<text x="{(start + end) / 2:.0f}" y="{y + LINE * (index + 0.6):.0f}" text-anchor="middle" fill="{color}" '
        f'stroke="#f8fafc" stroke-width="4" paint-order="stroke">{escape(text)}</text>'
        for index, text in enumerate(texts)
    ]
    y += LINE * len(texts)
    tip = end + (-3 if end > start else 3)
    drawn.append(
        f'<path d="M{start:.0f} {y:.0f}H{tip:.0f}" stroke="{color}" stroke-width="1.8"{dash} marker-end="url(#{marker})"/>'
    )
    return drawn, y + 20


def _marker(name: str, color: str) -> str:
    return (
        f'<marker id="{name}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0 10 5 0 10z" fill="{color}"/></marker>'
    )


def main() -> None:
    """Draw all of them."""
    for source in sorted((HERE / "diagrams").glob("*.txt")):
        (HERE / "images" / f"flow-{source.stem}.svg").write_text(
            draw(source.read_text())
        )


if __name__ == "__main__":
    main()
