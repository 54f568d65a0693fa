# SPDX-License-Identifier: Apache-2.0
r"""Scalar discrete sites in plates, summed out by funsor's sum-product.

.. math:: \log \sum_{h_1} \cdots \sum_{h_n} \prod_i f(h_i, v) = \sum_i \log \sum_{h_i} f(h_i, v)

for the units i of a plate. It holds where no factor leaves the plate, which is refused but for the
missing units of a site that is observed in part, and none
reads other units inside of it (a neighbour, a mean): the axis of the units is followed through the
operations of the model, as that of the rows is, and what is not shown to be apart is reported by
:func:`coupled_sites`, to be enumerated jointly.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_ebm._compat import eval_jaxpr, eval_provenance
from numpyro_ebm.model.finite_supports import support_values
from numpyro_ebm.model.row_model import RowModel
from numpyro_ebm.program.jaxprs import needed
from numpyro_ebm.program.row_axes import row_axes
from numpyro_ebm.types import Params, SiteValues

__all__ = ["coupled_sites", "draw_scalar_sites", "leaving_plates", "sum_scalar_sites"]

DRAWS_AT_ONCE = 256
"""Whose probabilities are in memory together."""


def leaving_plates(row_model: RowModel) -> str | None:
    """A site of a further plate factorises only over that plate: what outside reads it, or None."""
    if not any(_further_plates(row_model).values()):
        return None
    for name, (term, outside) in _readers_outside(row_model, _term_reads(row_model)).items():
        if name not in row_model.obs_masked:
            return (
                f"Enumerated(): '{term}' reads the latent site '{name}' outside its plate(s) "
                f"{outside}, so that the sum over '{name}' does not factorise. Put the "
                "term inside the plate, one value for each unit; or, where it couples the "
                "units, give them event dimensions instead of a plate, "
                "`Counting(event_shape=...)`, which are enumerated jointly."
            )
    return None


def _readers_outside(row_model, terms):
    """By latent site, a term that reads it outside its further plates, and which these are."""
    found, further = {}, _further_plates(row_model)
    for term, (plates, labels) in terms.items():
        for name in sorted(labels):
            outside = sorted({*further[name]} - plates.keys())
            if outside:
                found.setdefault(name, (term, outside))
    return found


def coupled_sites(row_model: RowModel) -> dict[str, str]:
    """Latent sites of further plates whose units are not shown to be independent given the rest.

    :param RowModel row_model: the model.
    :return: for each a clause that names the term and the plate.
    """
    return row_model.remember("coupled units", lambda: _find_coupled(row_model))


def sum_scalar_sites(
    row_model: RowModel,
    params: Params,
    values: SiteValues,
    names: Sequence[str],
    tilts: SiteValues | None = None,
) -> jax.Array:
    """log p̃ of every row, scalar sites that are not :func:`coupled_sites` summed out: (rows,).

    :param RowModel row_model: the model.
    :param dict params: parameter values by name.
    :param dict values: values of all other sites.
    :param names: names of the sites.
    :param dict tilts: what is added to log p̃ at every value of some sites, arrays of the shape of
        the site with values leading; their derivatives are posterior probabilities.
    """
    if not names:
        return row_model.log_density(params, values)
    import funsor

    funsor.set_backend("jax")
    factors, plates = [], frozenset()
    for array, sites, dims in _factors(row_model, params, values, names):
        factors.append(_as_funsor(array, [*sites, *dims]))
        plates |= {name for name in dims if name}
    for name, tilt in (tilts or {}).items():
        factors.append(_as_funsor(tilt, [name, *row_model.latent[name].dims]))
    result: Any = funsor.sum_product.sum_product(
        funsor.ops.logaddexp,
        funsor.ops.add,
        factors,
        eliminate=frozenset(names) | (plates - {row_model.plate}),
        plates=plates,
    )
    rows = result.align((row_model.plate,)) if result.inputs else result
    return jnp.broadcast_to(rows.data, (row_model.num_rows,))


def draw_scalar_sites(
    rng_key: jax.Array,
    row_model: RowModel,
    params: Params,
    values: SiteValues,
    names: Sequence[str],
    num_draws: int,
) -> SiteValues:
    """Exact draws of these sites given the values of all others, draws leading.

    Site by site, given those before, and the later ones summed out; those of fewer plates first,
    given which the units of a plate are independent.

    :param rng_key: random key.
    :param RowModel row_model: the model.
    :param dict params: parameter values by name.
    :param dict values: values of all other sites, draws leading.
    :param names: names of the sites.
    :param int num_draws: how many draws.
    """
    sites = {name: row_model.latent[name] for name in names}
    supports = {name: support_values(site, "Enumerated") for name, site in sites.items()}
    order = sorted(names, key=lambda name: len(_further_plates(row_model)[name]))

    def draw(x):
        rng_key, known = x
        keys = jax.random.split(rng_key, len(order))
        for i, (key, name) in enumerate(zip(keys, order, strict=True)):
            support, value = supports[name], jnp.asarray(sites[name].value)

            def total(tilt, known=known, i=i, name=name):
                rows = sum_scalar_sites(row_model, params, known, order[i:], {name: tilt})
                return jnp.sum(rows)

            probabilities = jax.grad(total)(jnp.zeros((len(support), *value.shape)))
            index = jax.random.categorical(key, jnp.log(probabilities), axis=0)
            known = {**known, name: jnp.asarray(support, value.dtype)[index]}
        return {name: known[name] for name in names}

    keys = jax.random.split(rng_key, num_draws)
    return jax.lax.map(draw, (keys, values), batch_size=DRAWS_AT_ONCE)


# Factors


def _factors(row_model, params, values, names):
    """Terms as arrays over the states of the sites that they read, and over their plates.

    Every term is evaluated at arrays of the shape that the sites have, all elements in one state:
    no element reads another, so that this gives each of them.

    :return: list of triples of an array, the names of its leading axes, sites, and those of the
        others, plates or ``None``.
    """
    supports = {name: support_values(row_model.latent[name], "Enumerated") for name in names}
    like = {name: jnp.asarray(row_model.latent[name].value) for name in names}
    plates: dict[str, dict[str, int]] = {}
    run = _traced_terms(row_model, {**params, **values}, plates)
    closed, shape = jax.make_jaxpr(lambda scalars: run(**scalars), return_shape=True)(like)
    results = dict(zip(sorted(shape), closed.jaxpr.outvars, strict=True))
    read = {term: tuple(sorted(_term_reads(row_model)[term][1] & like.keys())) for term in results}
    found = []
    for sites in sorted(set(read.values())):
        terms = [term for term in results if read[term] == sites]
        part = closed.jaxpr.replace(outvars=[results[term] for term in terms])
        part = part.replace(eqns=needed(part))

        def at_state(state, part=part, sites=sites):
            given = dict(zip(sites, state, strict=True))
            full = {k: jnp.full_like(x, given[k]) if k in given else x for k, x in like.items()}
            return eval_jaxpr(part, closed.consts, *jax.tree.leaves(full))

        columns = [supports[name].astype(like[name].dtype) for name in sites]
        states = [jnp.asarray(x.ravel()) for x in np.meshgrid(*columns, indexing="ij")]
        arrays = jax.vmap(at_state)(states) if sites else at_state([])
        for term, array in zip(terms, arrays, strict=True):
            own = array.shape[1:] if sites else array.shape
            names_of = {dim: name for name, dim in plates[term].items()}
            dims = [names_of.get(dim) for dim in range(-len(own), 0)]
            found.append((array.reshape(*map(len, columns), *own), sites, dims))
    return found


def _as_funsor(array, names):
    """An array whose axes have names; those of one element need none."""
    import funsor

    named = [name for name, size in zip(names, array.shape, strict=True) if size > 1]
    array = jnp.reshape(array, [size for size in array.shape if size > 1])
    dims = range(-array.ndim, 0)
    return funsor.to_funsor(array, funsor.Real, dim_to_name=dict(zip(dims, named, strict=True)))


# Couplings


def _further_plates(row_model):
    """Plates besides that of the data of every latent site, and their axes in its value."""
    return {
        name: {
            plate: axis
            for axis, plate in enumerate(site.dims)
            if plate in row_model.plates and plate != row_model.plate
        }
        for name, site in row_model.latent.items()
    }


def _traced_terms(row_model, values, plates):
    """Log-densities by site as a function of latent values, which fills their ``plates`` in."""

    def run(**latent):
        found = {}
        model_trace = row_model.trace_at({**values, **latent})
        for site in filter(row_model.owns, model_trace.values()):
            frames = {frame.name: frame.dim for frame in site["cond_indep_stack"]}
            plates[site["name"]] = frames
            found[site["name"]] = row_model.site_log_prob(site)
        return found

    return run


def _term_reads(row_model):
    """By site of the rows: its plates with their dimensions, and the latent sites that it reads."""
    plates: dict[str, dict[str, int]] = {}
    latent = {name: site.value for name, site in row_model.latent.items()}
    others = {**row_model.parameters, **row_model.visible_values}

    def find():
        read = eval_provenance(_traced_terms(row_model, others, plates), **latent)
        return {term: (plates[term], labels) for term, labels in read.items()}

    return row_model.remember("terms of latent sites", find)


def _find_coupled(row_model):
    further, found = _further_plates(row_model), {}
    if not any(further.values()):
        return found
    terms = _term_reads(row_model)
    for name, (term, _) in _readers_outside(row_model, terms).items():
        if name in row_model.obs_masked:  # NumPyro's `obs_mask` is one of plates
            found[name] = f"'{term}' reads all missing units of '{name}'"
    for plate in sorted({plate for axes in further.values() for plate in axes}):
        names = sorted(name for name, axes in further.items() if plate in axes)
        mixing = True
        while mixing:  # those that are left, given those that were found
            names = [name for name in names if name not in found]
            mixing = _mixing_terms(row_model, plate, {k: further[k][plate] for k in names})
            for term in mixing:
                clause = f"'{term}' may couple the units of the plate '{plate}'"
                found |= dict.fromkeys(terms[term][1] & set(names) or names, clause)
    return found


def _mixing_terms(row_model, plate, axes):
    """Terms in which an element of the plate may read others' values of some latent sites."""
    if not axes:
        return []
    values = {name: row_model.latent[name].value for name in row_model.latent}
    moving = {name: values.pop(name) for name in sorted(axes)}
    plates, order = {}, []

    def run(moving):
        others = {**row_model.parameters, **row_model.visible_values, **values}
        found = _traced_terms(row_model, others, plates)(**moving)
        order[:] = [(name, jnp.ndim(x)) for name, x in found.items()]
        return list(found.values())

    states = row_axes(run, moving, [axes[name] for name in sorted(axes)])
    return [
        name
        for (name, ndim), state in zip(order, states, strict=True)
        if state is not None and state != ndim + plates[name].get(plate, 0)
    ]
