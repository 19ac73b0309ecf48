"""Sphinx configuration."""

from stationmaster import __version__

project = "stationmaster"
author = "The stationmaster authors"
release = version = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the signature shows them; the prose says what they mean
myst_heading_anchors = 3
nitpick_ignore_regex = [("py:.*", ".*")]  # without the network there is no inventory to resolve foreign names
