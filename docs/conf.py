# SPDX-License-Identifier: Apache-2.0
"""Sphinx configuration. The build needs no network; with `ONLINE=1` it links to other manuals."""

import os
import sys
from pathlib import Path

import numpyro_ebm

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "numpyro-ebm"
author = "The numpyro-ebm developers"
project_copyright = author
release = numpyro_ebm.__version__
version = ".".join(release.split(".")[:2])

extensions = [
    "llms",
    "mathml",
    "names",
    "reference",
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["_build"]

# Markdown
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3


# API reference
autodoc_default_options = {"show-inheritance": True}
autosummary_generate = False  # `reference` writes the pages
autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
maximum_signature_line_length = 88
napoleon_google_docstring = False
napoleon_use_rtype = False

# Other manuals
if os.environ.get("ONLINE"):
    intersphinx_mapping = {
        "numpyro": ("https://num.pyro.ai/en/stable/", None),
        "jax": ("https://docs.jax.dev/en/latest/", None),
        "blackjax": ("https://blackjax-devs.github.io/blackjax/", None),
        "arviz": ("https://python.arviz.org/en/stable/", None),
        "optax": ("https://optax.readthedocs.io/en/latest/", None),
        "python": ("https://docs.python.org/3/", None),
    }

# HTML
html_theme = "furo"
# Summaries of hits are fetched, which browsers refuse pages that they read from disk.
html_show_search_summary = bool(os.environ.get("ONLINE"))
html_math_renderer = "mathml"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_title = f"{project} {release}"
html_short_title = "Energy-based models in NumPyro"
copybutton_exclude = ".linenos, .gp, .go"  # copy the input of a doctest, not its prompt and output
