"""Configuration of Sphinx; in `make check` every warning of it is an error."""

from __future__ import annotations

import ast
import re
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sphinx.application import Sphinx

# The package of this checkout, installed or not.
sys.path.insert(0, str(Path(__file__).parent.parent))

import django
from django.conf import settings

# Imported before autodoc does it: it pretends to be a type checker meanwhile, which
# FastAPI's models do not survive.
import dispytch_integrations.fastapi  # noqa: F401
from dispytch_integrations import __version__

# Modules of Django apps are imported once the apps are known.
settings.configure(INSTALLED_APPS=["dispytch_integrations.django"])
django.setup()

project = "dispytch-integrations"
copyright = "The dispytch-integrations authors"
release = __version__
version = release

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
nitpicky = False
# Fields called "type" are taken for the built-in type of the signatures.
suppress_warnings = ["ref.python"]

myst_enable_extensions = ["colon_fence", "deflist", "fieldlist"]
myst_heading_anchors = 3

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_default_options = {
    "members": True,
    "show-inheritance": True,
    "exclude-members": "model_config",
    # What a user writes in an event class.
    "special-members": (
        "__route__, __backend_config__, __ordering_key__, __event_type__, __broker__, "
        "__tombstone__"
    ),
}
python_use_unqualified_type_names = True

html_theme = "furo"
html_title = project
html_copy_source = False
html_show_sphinx = False
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_theme_options = {"navigation_with_keys": True, "top_of_page_buttons": []}
pygments_style = "friendly"
pygments_dark_style = "github-dark"


# -- docstrings --------------------------------------------------------------------
# They are written to be read in an editor: names in single backticks, examples
# indented, an argument per line. Here they become reStructuredText.


def _docstring(
    app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    lines[:] = _with_literals(_with_lists(_with_indented_example(lines)))


def _with_indented_example(lines: list[str]) -> list[str]:
    """Examples at the margin, where ruff moves them if nothing else follows."""
    if re.match(r"class |with .*:$|__\w+__ = ", "".join(lines[2:3])):
        return [*lines[:2], *(f"    {line}" for line in lines[2:])]
    return lines


def _with_lists(lines: list[str]) -> list[str]:
    """Lines such as "`timeout`: seconds ..." as a list, one item each."""
    made: list[str] = []
    in_item = False
    for line in lines:
        if re.match(r"`[^`]+`(, `[^`]+`)*: ", line):
            if not in_item and made and made[-1].strip():
                made.append("")
            in_item = True
            made.append(f"- {line}")
        elif in_item and line.strip() and not line.startswith((" ", "Raises ")):
            made.append(f"  {line}")
        else:
            if in_item and line.strip():
                made.append("")
            in_item = False
            made.append(line)
    return made


def _with_literals(lines: list[str]) -> list[str]:
    """Indented blocks as code, single backticks as literals."""
    made: list[str] = []
    block: list[str] = []
    before = ""
    for line in [*lines, ""]:
        indented = line.startswith("    ") and not before.startswith(("- ", "  - "))
        if indented or (block and not line.strip()):
            block.append(line)
            continue
        if block:
            made += _code(block)
            block = []
        made.append(re.sub(r"(?<!`)`([^`]+)`(?!`)", r"``\1``", line))
        if line.strip():
            before = line
    return made + (_code(block) if block else [])


def _code(block: list[str]) -> list[str]:
    text = textwrap.dedent("\n".join(block))
    try:
        compile(
            text,
            "docstring",
            "exec",
            flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT | ast.PyCF_ONLY_AST,
        )
        language = "python"
    except SyntaxError:
        language = "text"
    return [
        "",
        f".. code-block:: {language}",
        "",
        *(f"    {line}" for line in text.splitlines()),
        "",
    ]


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", _docstring)
