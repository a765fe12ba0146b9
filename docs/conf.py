"""Settings of the documentation site: Sphinx with Furo and MyST. Build it with ``make docs``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS.parent), str(DOCS)]

import generate

from rap_env import __version__

project = "RAP"
author = "the RAP contributors"
copyright = author
release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "_generated"]
html_theme = "furo"
html_title = f"RAP {release}"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # included tables begin below the page's first level
autodoc_member_order = "bysource"
autodoc_class_signature = "mixed"
autodoc_default_options = {"members": True}
napoleon_use_rtype = False
napoleon_use_ivar = True


def _replace_environment_docstring(
    app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Link to an environment's page in place of its class docstring, which is Markdown."""
    for page, (environment, kind) in generate.ENVIRONMENTS.items():
        if name == f"rap_env.{kind}":
            lines[:] = [f"``{environment}``; see :doc:`{page}`.", ""]


def setup(app: Any) -> None:
    """Generate pages and tables before Sphinx reads the sources."""
    app.connect("builder-inited", lambda _: generate.write_all(DOCS))
    app.connect("autodoc-process-docstring", _replace_environment_docstring)
