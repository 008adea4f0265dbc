"""Configuration of Sphinx; `make check` builds the pages with every warning as an error."""

from __future__ import annotations

from importlib.metadata import version as installed_version

project = "dispytch-integrations"
copyright = "The dispytch-integrations authors"
release = installed_version(project)
version = release

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
nitpicky = False

myst_enable_extensions = ["colon_fence", "deflist", "fieldlist"]
myst_heading_anchors = 3

autodoc_typehints = "description"
autodoc_member_order = "bysource"
# Clients are optional; the pages are built without connecting to anything.
autodoc_default_options = {"members": True, "show-inheritance": True}

html_theme = "furo"
html_title = project
html_copy_source = False
