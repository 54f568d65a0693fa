# SPDX-License-Identifier: Apache-2.0
"""Formulas as MathML, made at build time: browsers show it without a script or a network."""

import re

from docutils.nodes import SkipNode
from latex2mathml.converter import convert
from sphinx.util import logging

__all__ = ["setup"]

# The converter leaves delimiters behind `\big` and its kin, and what `\text` escapes, as they are.
LEFT = {r"\|": "&#x02016;", r"\{": "{", r"\}": "}", r"\_": "_"}
LOGGER = logging.getLogger(__name__)


def mathml(latex, node, **options):
    """A formula as MathML; a command that is not known is a warning, and so ends the build."""
    found = convert(latex, **options)
    for command, character in LEFT.items():
        found = found.replace(command, character)
    for word in re.findall(r">[^<]*(\\\w*)[^<]*<", found):
        LOGGER.warning("no MathML for %s in: %s", word, latex, location=node)
    return found


def visit_inline(translator, node):
    translator.body.append(mathml(node.astext(), node))
    raise SkipNode


def visit_block(translator, node):
    latex = node.astext()
    if r"\\" in latex and r"\begin" not in latex:  # several lines, aligned as Sphinx does it
        latex = rf"\begin{{aligned}}{latex}\end{{aligned}}"
    label = f'<span class="eqno">({node["number"]})</span>' if node["number"] else ""
    formula = mathml(latex, node, display="block")
    translator.body.append(f'<div class="math">{formula}{label}</div>')
    raise SkipNode


def setup(app):
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
