"""Pages of the documentation, taken apart: their blocks, and what those print."""

from __future__ import annotations

import doctest
import re
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Block", "blocks_of", "compare", "replaced"]


@dataclass(frozen=True)
class Block:
    """A fenced block, or a hidden check."""

    page: Path
    line: int
    language: str
    code: str
    comment: str

    @property
    def file(self) -> str | None:
        """The name of the file that the reader is told to make of it."""
        match = re.match(r"# ([\w/.]+\.(?:py|ini))$", self.code, re.MULTILINE)
        return match[1] if match else None

    @property
    def commands(self) -> list[str]:
        """The lines of a block of commands, without comments."""
        lines = self.code.replace("\\\n", " ").splitlines()
        return [command for line in lines if (command := line.partition(" #")[0].strip())]

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks_of(page: Path) -> Iterator[Block]:
    """The blocks of a page, in order; MyST's directives are left out."""
    lines = page.read_text().splitlines()
    index, comment = 0, ""
    while index < len(lines):
        line = lines[index].strip()
        fence = re.match(r"(`{3,})(.*)", line)
        end = fence[1] if fence else "-->" if line == "<!-- check" else None
        if end is not None:
            first = index + 1
            index = next((at for at in range(first, len(lines)) if lines[at].strip() == end), len(lines))
            language = fence[2].strip() if fence else "python"
            if not language.startswith("{"):
                code = textwrap.dedent("\n".join(lines[first:index]))
                yield Block(page, first + 1, language, code, comment)
        if line:
            match = re.fullmatch(r"<!-- (.*) -->", line)
            comment = match[1] if match else ""
        index += 1


def replaced(code: str, replacements: Mapping[str, str]) -> str:
    """Code of a page, with what stands for its addresses and names here."""
    for text, by in replacements.items():
        code = code.replace(text, by)
    return code


def compare(block: Block, printed: str, replacements: Mapping[str, str]) -> None:
    """Fail unless `printed` is what the block says; `...` in it stands for anything."""
    expected = replaced(block.code, replacements) + "\n"
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    assert doctest.OutputChecker().check_output(expected, printed, flags), (
        f"{block}: the page says\n{expected}\nand this was printed:\n{printed}"
    )
