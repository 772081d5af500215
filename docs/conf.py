"""What ``make docs`` runs Sphinx with, on this folder, the notebooks and the Markdown files, side by side."""

from triton_bn.version import __version__

project = "triton_bn"
author = "the triton_bn authors"
release = version = __version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",  # Args:, Returns:, Raises:
    "sphinx.ext.viewcode",
    "myst_nb",  # Markdown, and the notebooks
]
exclude_patterns = ["perf/results", "**/.ipynb_checkpoints"]
html_theme = "furo"
html_title = f"triton_bn {__version__}"

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the arguments' sections say it
autodoc_preserve_defaults = True
napoleon_custom_sections = ["Shape"]

nb_execution_mode = "off"  # notebooks are kept with their outputs
myst_heading_anchors = 3
suppress_warnings = [
    "myst.xref_missing",  # README links folders and source files of the repository
    "myst.header",  # a notebook's heading may skip a level
    "mystnb.unknown_mime_type",
]


def _escape(app, what, name, obj, options, lines):
    """``(N, C, *)`` is a shape, and begins no emphasis."""
    lines[:] = [line.replace("*)", r"\*)") for line in lines]


def setup(app):
    app.connect("autodoc-process-docstring", _escape)
