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
import numpyro.distributions as dist
from jax.typing import ArrayLike
from numpyro.distributions import constraints
from numpyro.handlers import infer_config
from numpyro.infer import Predictive
from numpyro.primitives import Messenger

from numpyro_ebm._compat import eval_provenance, funsor_tools
from numpyro_ebm.language.sites import plates_of
from numpyro_ebm.model.finite_supports import support_values
from numpyro_ebm.model.row_model import RowModel
from numpyro_ebm.program.row_axes import row_axes
from numpyro_ebm.types import Params, SiteValues

__all__ = ["coupled_sites", "draw_scalar_sites", "leaving_plates", "sum_scalar_sites"]


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
    row_model: RowModel, params: Params, values: SiteValues, names: Sequence[str]
) -> jax.Array:
    """log p̃ of every row, scalar sites that are not :func:`coupled_sites` summed out: (rows,).

    :param RowModel row_model: the model.
    :param dict params: parameter values by name.
    :param dict values: values of all other sites.
    :param names: names of the sites.
    """
    if not names:
        return row_model.log_density(params, values)
    import funsor

    enum, plate_to_enum_plate, packed_trace = funsor_tools()

    num_plate_dims = max(
        [-row_model.dim] + [np.ndim(s.value) - s.event_dim for s in row_model.latent.values()]
    )

    model = enum(_enumerating(row_model, {**params, **values}, names), -num_plate_dims - 1)
    with plate_to_enum_plate():
        model_trace = packed_trace(model).get_trace(*row_model.args, **row_model.kwargs)
    factors, plates = [], frozenset()
    for site in filter(row_model.owns, model_trace.values()):
        log_prob, dim_to_name = row_model.site_log_prob(site), site["infer"]["dim_to_name"]
        if not dim_to_name:  # a plate of size one has no name in funsor
            log_prob = jnp.squeeze(log_prob)
        factors.append(funsor.to_funsor(log_prob, funsor.Real, dim_to_name=dim_to_name))
        plates |= plates_of(site)
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

    :param rng_key: random key.
    :param RowModel row_model: the model.
    :param dict params: parameter values by name.
    :param dict values: values of all other sites, draws leading.
    :param names: names of the sites.
    :param int num_draws: how many draws.
    """
    predictive = Predictive(
        _enumerating(row_model, params, names),
        values,
        num_samples=num_draws,
        infer_discrete=True,
        parallel=True,
    )
    found = predictive(rng_key, *row_model.args, **row_model.kwargs)
    supports = _counted(row_model, names)
    return {k: jnp.asarray(supports[k])[found[k]] if k in supports else found[k] for k in names}


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


def _traced_terms(row_model, plates):
    """Log-densities by site as a function of latent values, which fills their ``plates`` in."""

    def run(**latent):
        values = {**row_model.parameters, **row_model.visible_values, **latent}
        found = {}
        for site in filter(row_model.owns, row_model.trace_at(values).values()):
            frames = {frame.name: frame.dim for frame in site["cond_indep_stack"]}
            plates[site["name"]] = frames
            found[site["name"]] = row_model.site_log_prob(site)
        return found

    return run


def _term_reads(row_model):
    """By site of the rows: its plates with their dimensions, and the latent sites that it reads."""
    plates: dict[str, dict[str, int]] = {}
    latent = {name: site.value for name, site in row_model.latent.items()}
    read = eval_provenance(_traced_terms(row_model, plates), **latent)
    return {term: (plates[term], labels) for term, labels in read.items()}


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
        found = _traced_terms(row_model, plates)(**values, **moving)
        order[:] = [(name, jnp.ndim(x)) for name, x in found.items()]
        return list(found.values())

    states = row_axes(run, moving, [axes[name] for name in sorted(axes)])
    return [
        name
        for (name, ndim), state in zip(order, states, strict=True)
        if state is not None and state != ndim + plates[name].get(plate, 0)
    ]


# Enumeration


def _counted(row_model, names):
    """Values of the sites whose support is not 0, …, K - 1, which is all that funsor counts."""
    supports = {name: support_values(row_model.latent[name], "Enumerated") for name in names}
    return {k: x for k, x in supports.items() if not np.array_equal(x, np.arange(len(x)))}


def _enumerating(row_model, values, names):
    """The model at given values, its scalar discrete sites to be enumerated by NumPyro."""

    def configure(site):
        # All other sites have values, whatever their own `infer` says.
        return {"enumerate": "parallel" if site["name"] in names else None}

    model = infer_config(row_model.substituted(values), configure)
    return _count_values(model, _counted(row_model, names))


class _count_values(Messenger):
    """Sites of other values than 0, …, K - 1 as their places among these, to all handlers outside.

    :param fn: a model.
    :param dict supports: the values by name of the site.
    """

    def __init__(self, fn: Any = None, supports: Any = None):
        self.supports = {} if supports is None else supports
        super().__init__(fn)

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "sample" and msg["name"] in self.supports:
            msg["fn"] = _Places(msg["fn"], self.supports[msg["name"]])

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "sample" and msg["name"] in self.supports:
            msg["value"] = jnp.asarray(self.supports[msg["name"]])[msg["value"]]


class _Places(dist.Distribution):
    """A scalar discrete distribution over the places of its values."""

    support: Any = constraints.nonnegative_integer
    has_enumerate_support = True

    def __init__(self, fn: Any, values: np.ndarray):
        self.fn, self.values = fn, values
        super().__init__(fn.batch_shape, ())

    def sample(self, key: jax.Array | None, sample_shape: tuple[int, ...] = ()) -> jax.Array:
        return jnp.searchsorted(jnp.asarray(self.values), self.fn.sample(key, sample_shape))

    def log_prob(self, value: ArrayLike, intermediates: Any = None) -> jax.Array:
        return self.fn.log_prob(jnp.asarray(self.values)[jnp.asarray(value)])

    def enumerate_support(self, expand: bool = True) -> jax.Array:
        places = jnp.arange(len(self.values)).reshape((-1,) + (1,) * len(self.batch_shape))
        return jnp.broadcast_to(places, (len(places), *self.batch_shape)) if expand else places
