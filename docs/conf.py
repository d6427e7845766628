"""Builds the documentation: ``python -m sphinx -W docs build/docs``."""

from __future__ import annotations

from tlgc_mp import __version__

project = "tlgc_mp"
author = "The tlgc_mp authors"
release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["examples"]
html_theme = "furo"
html_title = f"tlgc_mp {release}"
myst_heading_anchors = 4
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_use_rtype = False
