# SPDX-License-Identifier: Apache-2.0
"""Whether an energy sees the visible value that an objective sets, or the raw argument.

An objective evaluates the model at other visible values (noised, moved, sampled) by overriding the
visible sites. A model that computes its energy from the *argument* instead of the value that
``numpyro.sample(..., obs=...)`` returned ignores them, and learns nothing, or the wrong thing. Here
the dependence of every energy, and of every draw of a guide, on arguments and visible sites is
traced through the computation, without running it.
"""

from typing import Any

import jax
import jax.numpy as jnp
from numpyro.distributions import biject_to
from numpyro.handlers import seed, substitute, trace

from numpyro_ebm._compat import eval_provenance, not_jax_tracer
from numpyro_ebm.errors import ModelError
from numpyro_ebm.language.distributions import lowest_value
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
    arrays, values = traced.arguments.arrays, {k: x.value for k, x in row_model.sites.items()}
    visible = {f"visible:{name}": values[name] for name in row_model.visible}
    data = {**row_model.plates, **row_model.parameters, **values}

    def run(**labelled):
        again = traced.with_arrays({label: labelled[label] for label in arrays})
        own = {name: labelled[f"visible:{name}"] for name in row_model.visible}
        observed = {name: site.value for name, site in again.visible(jax.random.key(0), {}).items()}
        return again.evaluate("terms", {**data, **own}), observed

    per_row = {
        label
        for label, x in arrays.items()
        if x.shape[0] in (row_model.num_rows, row_model.total_rows)
    }
    terms, observed = eval_provenance(run, **arrays, **visible)
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
        per_row -= whole
        for term in terms:
            if term != name and whole & terms[term]:
                raise ModelError(
                    f"The energy '{term}' reads the data of the visible site '{name}' from the "
                    "model's argument, so it would not see the noise or the samples of an "
                    f"objective. {_write_this(name)}"
                )
    row_model.covariates = sorted(per_row & frozenset().union(*terms.values()))
    row_model.covariates += _row_parameters(row_model)


def _row_parameters(row_model):
    """Parameters of which every row has a value of its own.

    An axis may be as long as the plate by chance. So the rows are compared at a random value of the
    parameter, with all other values the same in all rows.
    """
    rows = row_model.num_rows
    shaped = [
        name
        for name, x in row_model.parameters.items()
        if rows > 1 and hasattr(x, "shape") and rows in x.shape
    ]
    if not shaped:
        return []

    def alike(x):
        """Equal rows, and a known value where the argument is traced."""
        x = jnp.ones(x.shape, x.dtype) if not not_jax_tracer(x) else jnp.asarray(x)
        return jnp.broadcast_to(x[:1], x.shape) if x.shape[0] in (rows, row_model.total_rows) else x

    with jax.ensure_compile_time_eval():
        arrays = {label: alike(x) for label, x in row_model.traced.arguments.arrays.items()}
        again = row_model.traced.with_arrays(arrays)
        plates = {k: jnp.arange(len(x)) for k, x in row_model.plates.items()}
        key_visible, key_parameter = jax.random.split(jax.random.key(0))
        values = _alike_visible(row_model, key_visible)

        def differ(name):
            parameters = _random_parameter(row_model, key_parameter, name)
            terms = again.evaluate("terms", {**plates, **parameters, **values})
            densities: Any = sum(terms.values())
            gap = jnp.abs(densities - densities[0])
            return jnp.max(gap) > 1e-3 * (1 + jnp.abs(densities[0]))

        return [name for name in shaped if differ(name)]


def _alike_visible(row_model, rng_key):
    """Values of all sites of a row, the same in all rows."""
    shapes, z = jax.eval_shape(row_model.unconstrain_visible), {}
    for key, name in zip(jax.random.split(rng_key, len(shapes)), shapes, strict=True):
        x = shapes[name]
        axis = row_model.row_axis(name, x)
        one = _at_random(key, (*x.shape[:axis], 1, *x.shape[axis + 1 :]), x.dtype)
        z[name] = jnp.broadcast_to(one, x.shape)
    values, _ = row_model.constrain(z)
    others = {k: x for k, x in row_model.sites.items() if k in row_model.latent or x.is_discrete}
    return values | {k: _same_in_all_rows(row_model, site) for k, site in others.items()}


def _random_parameter(row_model, rng_key, name):
    """Values of all parameters, of which one is random and the others are constant."""
    parameters = {
        k: jax.tree.map(lambda x: jnp.ones(jnp.shape(x), jnp.result_type(x)), x)
        for k, x in row_model.parameters.items()
    }
    supports = {k: fn.support for k, fn in row_model.priors.items()}
    for k, support in {**row_model.constraints, **supports}.items():
        if hasattr(parameters[k], "shape") and not support.is_discrete:
            transform = biject_to(support)
            shape = transform.inverse_shape(parameters[k].shape)
            spread = 1.0 if k == name else 0.0
            z = _at_random(rng_key, shape, parameters[k].dtype) - 1.0
            parameters[k] = transform(spread * z)
    return parameters


def _at_random(rng_key, shape, dtype):
    if jnp.issubdtype(dtype, jnp.floating):
        return jax.random.uniform(rng_key, shape, dtype, 0.5, 1.5)
    return jnp.ones(shape, dtype)


def _same_in_all_rows(row_model, site):
    """A value on the support of a site, equal in all rows, and known where the site's is traced."""
    shape = jnp.shape(site.value)
    if not_jax_tracer(site.value):
        axis = len(shape) + row_model.dim - site.event_dim
        first = jnp.take(jnp.asarray(site.value), jnp.array([0]), axis)
        return jnp.broadcast_to(first, shape)
    if site.is_discrete:
        return jnp.full(shape, lowest_value(site.fn.support))
    return site.transform(jnp.zeros(site.transform.inverse_shape(shape)))


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
        prepared = seed(set_visible(substitute(guide, data=data), values), jax.random.key(0))
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
