"""The documentation site: ``make docs``, then open docs/_build/html/index.html."""

from __future__ import annotations

import sys
from pathlib import Path

import peaknet_predict

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "peaknet-predict"
author = "peaknet-predict developers"
copyright = "peaknet-predict developers"
release = version = peaknet_predict.__version__

# The source directory is the repository, so that README and CONTRIBUTING are pages, too, and a
# link between pages leads to the same file here and in a checkout.
include_patterns = [
    "docs/**",
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "benchmarks/README.md",
]
exclude_patterns = ["docs/_build", "docs/_ext"]
root_doc = "docs/index"

extensions = [
    "myst_nb",
    "settings_directive",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]

myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]
highlight_language = "none"
# A heading may skip a level, in pages that are read on their own as well.
suppress_warnings = ["myst.header"]

# The notebook is kept without outputs, and run here.
nb_execution_mode = "auto"
nb_execution_timeout = 300
nb_execution_raise_on_error = True

# Single backquotes in docstrings name things; what leads nowhere is code.
default_role = "code"
smartquotes = False  # two hyphens begin an option
autodoc_member_order = "bysource"
autodoc_typehints = "none"
napoleon_numpy_docstring = True
napoleon_google_docstring = False
napoleon_use_rtype = False

html_theme = "pydata_sphinx_theme"
html_title = f"peaknet-predict {version}"
html_theme_options = {
    "show_nav_level": 2,
    "navigation_with_keys": False,
    "secondary_sidebar_items": ["page-toc"],
}
html_show_sourcelink = False

# `make linkcheck`, every night: other people's pages.
linkcheck_timeout = 30
linkcheck_retries = 2
