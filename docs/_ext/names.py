# SPDX-License-Identifier: Apache-2.0
"""Code names in prose link to their page, and tables can be read on a phone.

A literal that is a public name, `NCE`, `ebm.NCE(...)` or `plots.samples`, links to its page of the
reference; names of NumPyro, JAX, BlackJAX, ArviZ and Optax do where their inventories were read.
"""

import re

from docutils import nodes
from reference import MEMBERS, objects
from sphinx.addnodes import desc, pending_xref
from sphinx.transforms import SphinxTransform
from sphinx.transforms.post_transforms import SphinxPostTransform

__all__ = ["setup"]

NAME = re.compile(r"(?:ebm\.|numpyro_ebm\.)?([A-Za-z]\w*(?:\.\w+)*)(?:\(.*\))?", re.DOTALL)
FOREIGN = re.compile(r"(?:numpyro|jax|jnp|dist|blackjax|az|arviz|optax)\.[\w.]+")
PROSE = 60
"""Characters in a row of three columns that are sentences, and not names and numbers."""
PREFIXES = {"jnp.": "jax.numpy.", "dist.": "numpyro.distributions.", "az.": "arviz."}
# Names of NumPyro that stand without their module, and where its reference has them.
NUMPYRO = {
    "MCMC": "numpyro.infer.mcmc.MCMC",
    "NUTS": "numpyro.infer.hmc.NUTS",
    "HMC": "numpyro.infer.hmc.HMC",
    "HMCECS": "numpyro.infer.hmc_gibbs.HMCECS",
    "DiscreteHMCGibbs": "numpyro.infer.hmc_gibbs.DiscreteHMCGibbs",
    "SVI": "numpyro.infer.svi.SVI",
    "Trace_ELBO": "numpyro.infer.elbo.Trace_ELBO",
    "TraceEnum_ELBO": "numpyro.infer.elbo.TraceEnum_ELBO",
    "Predictive": "numpyro.infer.util.Predictive",
    "numpyro.sample": "numpyro.primitives.sample",
    "numpyro.param": "numpyro.primitives.param",
    "numpyro.plate": "numpyro.primitives.plate",
    "numpyro.factor": "numpyro.primitives.factor",
    "numpyro.infer.SVI": "numpyro.infer.svi.SVI",
    "numpyro.infer.MCMC": "numpyro.infer.mcmc.MCMC",
}


def own_names():
    """What prose calls an object, and the name of its entry."""
    names = {}
    for name in objects():
        entry = f"numpyro_ebm.{name}"
        names.setdefault(name, entry)
        names.setdefault(name.rpartition(".")[2], entry)
        for member in filter(None, MEMBERS.get(name, "").split(", ")):
            names[f"{name.rpartition('.')[2]}.{member}"] = f"{entry}.{member}"
    return names


OWN = own_names()


def target_of(text):
    if text in NUMPYRO:
        return NUMPYRO[text]
    if FOREIGN.fullmatch(text):
        prefix = text.partition(".")[0] + "."
        return PREFIXES.get(prefix, prefix) + text.removeprefix(prefix)
    match = NAME.fullmatch(text)
    return OWN.get(match[1]) if match else None


class LinkNames(SphinxTransform):
    default_priority = 400

    def apply(self, **kwargs):
        for literal in list(self.document.findall(nodes.literal)):
            target = target_of(literal.astext())
            here = f"api/{target}" == self.env.docname
            linked = any(
                isinstance(parent, (nodes.reference, pending_xref, nodes.title))
                for parent in ancestors(literal)
            )
            if target is None or here or linked:
                continue
            link = pending_xref(
                "", refdomain="py", reftype="obj", reftarget=target, refdoc=self.env.docname
            )
            link["refspecific"] = False
            literal.replace_self(link)
            link += literal


class ReadableTables(SphinxPostTransform):
    """Each cell of a wide table names its column, which phones show; long names may break."""

    default_priority = 800
    formats = ("html",)

    def run(self, **kwargs):
        for table in self.document.findall(nodes.table):
            heads = [entry.astext() for head in table.findall(nodes.thead) for entry in head[0]]
            rows = next(iter(table.findall(nodes.tbody)))
            words = sum(len(row.astext()) for row in rows) / len(rows)
            is_wide = len(heads) > 3 or (len(heads) == 3 and words > PROSE)
            if not is_wide or any(isinstance(a, desc) for a in ancestors(table)):
                continue
            table["classes"].append("stacked")
            for row in rows:
                for head, entry in zip(heads, row, strict=False):
                    text = entry.astext()
                    is_number = text.replace(",", "").isdigit()  # it is no title of a card
                    entry["classes"] += [] if text else ["empty"]
                    classes = ["column", "number"] if is_number else ["column"]
                    entry.insert(0, nodes.inline("", head, classes=classes))
        for literal in self.document.findall(nodes.literal):
            if any(isinstance(parent, nodes.table) for parent in ancestors(literal)):
                break_names(literal)
        for title in self.document.findall(nodes.title):
            if " " not in title.astext():
                break_names(title)


def break_names(node):
    """Where a long name may go on in the next line."""
    parts = re.split(r"(?<=[a-z_.])(?=[A-Z_])", node.astext())
    node.children = []
    for i, part in enumerate(parts):
        node += [nodes.raw("", "<wbr>", format="html")] * (i > 0)
        node += nodes.Text(part)


def ancestors(node):
    while node.parent is not None:
        node = node.parent
        yield node


def missing(app, env, node, contnode):
    """Names of types in signatures, which are written without their module."""
    target = OWN.get(node.get("reftarget", "").removeprefix("ebm."))
    if node.get("refdomain") == "py" and target and target != node["reftarget"]:
        domain = env.get_domain("py")
        return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", target, node, contnode)
    return None


def setup(app):
    app.add_transform(LinkNames)
    app.add_post_transform(ReadableTables)
    app.connect("missing-reference", missing)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
