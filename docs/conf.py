# SPDX-License-Identifier: Apache-2.0
"""Sphinx configuration. The build needs no network: there is no intersphinx."""

import os
import sys
from importlib import import_module
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
    "mathml",
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["_build"]

# Markdown
myst_enable_extensions = ["colon_fence", "dollarmath", "substitution"]
myst_heading_anchors = 3


def reference(folder):
    """Reference entries of the public names of a folder, for ``{{ folder }}`` in a page."""
    module = import_module(f"numpyro_ebm.{folder}")
    lines = []
    for name in module.__all__:
        kind = "autoclass" if isinstance(getattr(module, name), type) else "autofunction"
        lines.append(f".. {kind}:: numpyro_ebm.{name}")
    return "\n".join(["```{eval-rst}", *lines, "```"])


myst_substitutions = {folder: reference(folder) for folder in ("marginals", "mcmc", "objectives")}

# API reference
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
maximum_signature_line_length = 88
napoleon_google_docstring = False
napoleon_use_rtype = False

# HTML
html_theme = "furo"
html_math_renderer = "mathml"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_title = f"{project} {release}"
copybutton_exclude = ".linenos, .gp, .go"  # copy the input of a doctest, not its prompt and output
