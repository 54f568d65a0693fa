# SPDX-License-Identifier: Apache-2.0
"""Formulas as MathML, made at build time: browsers show it without a script or a network."""

from docutils.nodes import SkipNode
from latex2mathml.converter import convert

__all__ = ["setup"]


def visit_inline(translator, node):
    translator.body.append(convert(node.astext()))
    raise SkipNode


def visit_block(translator, node):
    latex = node.astext()
    if r"\\" in latex and r"\begin" not in latex:  # several lines, aligned as Sphinx does it
        latex = rf"\begin{{aligned}}{latex}\end{{aligned}}"
    label = f'<span class="eqno">({node["number"]})</span>' if node["number"] else ""
    translator.body.append(f'<div class="math">{convert(latex, display="block")}{label}</div>')
    raise SkipNode


def setup(app):
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
