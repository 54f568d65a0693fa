# SPDX-License-Identifier: Apache-2.0
"""Whether an energy sees the visible value that an objective sets, or the raw argument.

An objective evaluates the model at other visible values (noised, moved, sampled) by overriding the
visible sites. A model that computes its energy from the *argument* instead of the value that
``numpyro.sample(..., obs=...)`` returned ignores them, and learns nothing, or the wrong thing. Here
the dependence of every energy, and of every draw of a guide, on arguments and visible sites is
traced through the computation, without running it.
"""

import jax
import jax.numpy as jnp
from numpyro.handlers import seed, substitute, trace

from numpyro_ebm._compat import eval_provenance, track_deps_jaxpr
from numpyro_ebm.errors import ModelError
from numpyro_ebm.keys import default_key
from numpyro_ebm.language.handlers import set_visible
from numpyro_ebm.model.row_model import RowModel
from numpyro_ebm.types import Model, Params

__all__ = ["check_guide", "check_model"]


def check_model(row_model: RowModel) -> None:
    """Raise unless every visible site reaches the density, and no energy bypasses it.

    :param RowModel row_model: the model.
    :raises ModelError: naming the energy, the visible site and what to write instead.
    """
    if not row_model.visible:
        return
    traced = row_model.traced
    traced.check_arguments()
    arrays = traced.arguments.arrays

    def run(**arrays):
        sites = traced.with_arrays(arrays).visible(default_key(), {})
        return {name: site.value for name, site in sites.items()}

    observed = eval_provenance(run, **arrays)
    closed, operands, names = row_model.terms_program()
    labels = [_label(row_model, operand) for operand in operands]
    terms = dict(zip(names, track_deps_jaxpr(closed.jaxpr, labels), strict=True))
    for name, site in row_model.visible.items():
        own = "visible:" + name
        shaping = [labels for term, labels in terms.items() if term != name or not site.is_flat]
        if not any(own in labels for labels in shaping):
            raise ModelError(
                f"No energy depends on the visible site '{name}'. {_write_this(name)} "
                f"(The energies are {row_model.energies}.)"
            )
        # An argument that is the visible value, and holds nothing else: no energy may read it.
        whole = {
            label
            for label in observed[name]
            if observed[name] == {label} and arrays[label].shape == jnp.shape(site.value)
        }
        row_model.arguments.update(dict.fromkeys(whole, name))
        for term in terms:
            if whole & terms[term]:
                kind = "base measure of" if term == name else "energy"
                raise ModelError(
                    f"The {kind} '{term}' reads the data of the visible site '{name}' from the "
                    "model's argument, so it would not see the noise or the samples of an "
                    f"objective. {_write_this(name)}"
                )


def _label(row_model, operand):
    """What a value that a program reads is: an argument, a visible value, or neither."""
    if operand.role == "array":
        return frozenset({operand.name})
    is_visible = operand.role == "visible" and operand.name in row_model.visible
    return frozenset({"visible:" + operand.name}) if is_visible else frozenset()


def check_guide(
    row_model: RowModel, guide: Model, params: Params, *, may_ignore_visible: bool = False
) -> None:
    """Raise unless the guide's draws depend on the visible sites, through ``visible`` statements.

    :param bool may_ignore_visible: accept a guide that does not read v (importance weights
        correct it).
    :raises ModelError: naming the site and what to write instead.
    """
    arguments = row_model.traced.arguments
    visible = {f"visible:{name}": site.value for name, site in row_model.visible.items()}

    def run(**labelled):
        here = arguments.with_arrays({label: labelled[label] for label in arguments.arrays})
        values = {name: labelled[f"visible:{name}"] for name in row_model.visible}
        data = {**row_model.plates, **params}
        prepared = seed(set_visible(substitute(guide, data=data), values), default_key())
        guide_trace = trace(prepared).get_trace(*here.args, **here.kwargs)
        return {
            name: (site["value"], site["fn"].log_prob(site["value"]))
            for name, site in guide_trace.items()
            if site["type"] == "sample" and not site["is_observed"]
        }

    labels = jax.tree.leaves(
        eval_provenance(run, **arguments.arrays, **visible),
        is_leaf=lambda x: isinstance(x, frozenset),
    )
    seen = frozenset().union(*labels)
    for label, name in row_model.arguments.items():
        if label in seen:
            raise ModelError(
                f"The guide reads the data of the visible site '{name}' from its argument, so it "
                "would be fitted to the posterior at other values than the objective's. Write "
                f'`v = numpyro_ebm.visible("{name}", data)` in the guide and use `v`.'
            )
    if not may_ignore_visible and not any(label.startswith("visible:") for label in seen):
        names = ", ".join(f'`numpyro_ebm.visible("{name}", ...)`' for name in row_model.visible)
        raise ModelError(
            f"The guide ignores the visible sites: q(h | v) must depend on v, read through {names}."
            " (`VaGES(importance_weighted=True)` accepts a guide that does not.)"
        )


def _write_this(name):
    return (
        f'Write `v = numpyro.sample("{name}", ..., obs=data)` and compute the energy from the '
        "returned `v`, not from `data`."
    )
