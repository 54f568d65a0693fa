# SPDX-License-Identifier: Apache-2.0
"""Sphinx configuration. The build needs no network: there is no intersphinx."""

import os
from importlib import import_module
from importlib.metadata import version as installed_version

os.environ.setdefault("JAX_PLATFORMS", "cpu")

project = "numpyro-ebm"
author = "The numpyro-ebm developers"
project_copyright = author
release = installed_version("numpyro-ebm")
version = ".".join(release.split(".")[:2])

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
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
html_title = f"{project} {release}"
copybutton_exclude = ".linenos, .gp, .go"  # copy the input of a doctest, not its prompt and output
