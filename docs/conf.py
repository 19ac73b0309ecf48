"""Sphinx configuration."""

import re

from stationmaster import __version__

project = "stationmaster"
author = "The stationmaster authors"
release = version = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
autodoc_mock_imports = ["pytest"]  # the contract suites are tests
exclude_patterns = ["_build"]
html_theme = "furo"
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the signature shows them; the prose says what they mean
myst_heading_anchors = 3
nitpick_ignore_regex = [
    ("py:.*", ".*")
]  # without the network there is no inventory to resolve foreign names


def read_as_markdown(app, what, name, obj, options, lines):  # noqa: ANN001, ANN201, ARG001, PLR0917
    # Docstrings are written for people in an editor: `code` has one backtick. A module's own is about its inside.
    if what == "module":
        lines.clear()
    lines[:] = [re.sub(r"(?<!`)`([^`]+)`(?!`)", r"``\1``", line) for line in lines]


def hide_colon(app, what, name, obj, options, lines):  # noqa: ANN001, ANN201, ARG001, PLR0917
    # Else napoleon takes what stands before it in an attribute's first line for a type.
    if what in {"attribute", "data", "property"} and lines:
        lines[0] = lines[0].replace(":", "\N{RATIO}")


def show_colon(app, what, name, obj, options, lines):  # noqa: ANN001, ANN201, ARG001, PLR0917
    lines[:] = [line.replace("\N{RATIO}", ":") for line in lines]


def setup(app):  # noqa: ANN001, ANN201
    app.connect("autodoc-process-docstring", read_as_markdown, priority=1)
    app.connect("autodoc-process-docstring", hide_colon, priority=2)
    app.connect("autodoc-process-docstring", show_colon, priority=999)
