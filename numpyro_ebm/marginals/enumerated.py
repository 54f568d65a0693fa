# SPDX-License-Identifier: Apache-2.0
r"""Sum discrete latent sites out exactly.

.. math:: \log\tilde p(v; θ) = \log \sum_h \tilde p(v, h; θ)

Scalar latent sites, in the data plate or in further plates, are summed by NumPyro's funsor backend:
the sum over a plate of hidden units factorises, so that 100 units cost 100 sums of two terms and
not one of 2^100. Binary sites with event dimensions in which log p̃ is affine, as in restricted
Boltzmann machines, factorise as well,

.. math:: \log \sum_{h \in \{0, 1\}^H} e^{a + b^\top h} = a + \sum_j \operatorname{softplus}(b_j),
    \qquad a = \log\tilde p(v, 0), \quad b = ∇_h \log\tilde p(v, h),

for one gradient whatever H is; that it is affine is read off the operations of the energy. Other
sites with event dimensions are enumerated jointly, state by state.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logsumexp
from numpyro.handlers import infer_config
from numpyro.infer import Predictive

from numpyro_ebm._compat import eval_provenance, funsor_tools
from numpyro_ebm.language.sites import plates_of
from numpyro_ebm.marginals.base import ExactMarginal
from numpyro_ebm.model.finite_supports import (
    in_all_rows,
    is_binary,
    joint_states,
    num_joint_states,
)
from numpyro_ebm.model.row_model import RowModel
from numpyro_ebm.program.jaxprs import at_zero
from numpyro_ebm.program.polynomial import structure
from numpyro_ebm.types import Params, SiteValues

__all__ = ["Enumerated", "factorises"]


class Enumerated(ExactMarginal):
    """The exact marginal of a model whose latent sites are all discrete.

    :param int max_states: the most joint states of latent sites with event dimensions, per row;
        binary units that do not interact are not counted, for their sum factorises.
    :raises ModelError: when used on continuous latents, or on more states than ``max_states``.

    **Example**

    >>> import numpyro_ebm as ebm
    >>> ebm.Enumerated()
    Enumerated(max_states=65536)
    """

    def __init__(self, *, max_states: int = 65_536):
        self.max_states = max_states

    def why_not(self, row_model: RowModel) -> str | None:
        if not row_model.latent:
            return "Enumerated() is for discrete latent sites; use `Exact()` here."
        if factorises(row_model):
            return None
        for name, site in row_model.latent.items():
            if not site.is_discrete:
                return (
                    f"Enumerated() cannot sum out the continuous latent site '{name}'; use "
                    "`GaussianLatents()`, or `VaGES()` with a guide."
                )
            if not site.fn.has_enumerate_support:
                return f"The latent site '{name}' has infinitely many values."
            if site.fn.event_shape:
                if np.size(site.value) != row_model.num_rows * math.prod(site.fn.event_shape):
                    return (
                        f"The latent site '{name}' has event dimensions inside a further plate; "
                        "make them plates as well (they factorise), or all event dimensions."
                    )
        states = self.num_states(row_model)
        if states > self.max_states:
            return (
                f"The latent sites {sorted(row_model.latent)} have {states:.6g} joint states per "
                f"row, more than max_states={self.max_states}. If the energy is a sum over units, "
                "declare them in a plate, "
                '`with numpyro.plate("units", n, dim=-2): h = numpyro.sample("h", Counting())`, '
                "with the units' energy inside it: the sum then factorises. Else use `VaGES()`."
            )
        return _leaving_plates(row_model)

    def num_states(self, row_model: RowModel) -> float:
        if factorises(row_model):
            return 1
        return num_joint_states(row_model, _event_sites(row_model), "Enumerated")

    def log_density(self, row_model: RowModel, params: Params, values: SiteValues) -> jax.Array:
        if factorises(row_model):
            without, logits = _unit_logits(row_model, params, values)
            return without + sum(
                row_model.sum_to_rows(_sum_event(row_model.latent[name], jax.nn.softplus(x)))
                for name, x in logits.items()
            )
        states = _event_states(row_model)
        if not states:
            return _sum_scalar_sites(row_model, params, values)
        return logsumexp(_state_log_densities(row_model, params, values, states), axis=0)

    def conditional(
        self, row_model: RowModel, params: Params, values: SiteValues
    ) -> Callable[[jax.Array], SiteValues]:
        """As in the base class, for the sites with event dimensions."""
        if factorises(row_model):
            _, logits = _unit_logits(row_model, params, values)

            def draw(rng_key) -> SiteValues:
                keys = jax.random.split(rng_key, len(logits))
                return {
                    name: jax.random.bernoulli(key, jax.nn.sigmoid(x))
                    for key, (name, x) in zip(keys, logits.items(), strict=True)
                }
        else:
            states = _event_states(row_model)
            log_densities = _state_log_densities(row_model, params, values, states)

            def draw(rng_key) -> SiteValues:
                chosen = jax.random.categorical(rng_key, log_densities, axis=0)  # (rows,)
                return row_model.from_rows({name: x[chosen] for name, x in states.items()})

        def of_type(rng_key):
            types = {name: site.value.dtype for name, site in row_model.latent.items()}
            return {name: x.astype(types[name]) for name, x in draw(rng_key).items()}

        return of_type

    def draw(
        self,
        rng_key: jax.Array,
        row_model: RowModel,
        params: Params,
        values: SiteValues,
        num_draws: int,
    ) -> SiteValues:
        event = _event_sites(row_model)
        scalar = [name for name in row_model.latent if name not in event]
        key_event = key_scalar = rng_key
        if values or scalar:
            key_event, key_scalar = jax.random.split(rng_key)
        draws = {}
        if event:
            draws = super().draw(key_event, row_model, params, values, num_draws)
        if scalar:
            predictive = Predictive(
                _enumerating(row_model, params, scalar),
                {**values, **draws},
                num_samples=num_draws,
                infer_discrete=True,
                parallel=True,
            )
            predicted = predictive(key_scalar, *row_model.args, **row_model.kwargs)
            draws |= {name: predicted[name] for name in scalar}
        return draws


def factorises(row_model: RowModel) -> bool:
    """Whether all latent sites are binary, with event dimensions, and log p̃ is affine in them."""
    return row_model.remember("affine", lambda: _is_affine(row_model))


def _is_affine(row_model):
    for site in row_model.latent.values():
        if not (site.fn.event_shape and site.is_discrete and is_binary(site)):
            return False

    def log_density(latent):
        return row_model.log_density(row_model.parameters, {**row_model.visible_values, **latent})

    try:
        found = structure(log_density, _units(row_model))
    except TypeError:  # an energy that uses its units as indices or flags, and not as numbers
        return False
    return bool(row_model.latent) and found.degree <= 1 and found.true_gradient


def _unit_logits(row_model, params, values):
    """log p̃(v, h = 0) of every row, and the log-odds of every unit, where it :func:`factorises`."""

    def rows(latent):
        return row_model.log_density(params, {**values, **latent})

    units = _units(row_model)
    return at_zero(rows, units), jax.grad(lambda latent: jnp.sum(rows(latent)))(units)


def _units(row_model):
    float_type = jnp.result_type(float)
    return {
        name: jnp.zeros(jnp.shape(site.value), float_type)
        for name, site in row_model.latent.items()
    }


def _sum_event(site, x):
    return jnp.sum(x, tuple(range(-site.event_dim, 0)))


def _leaving_plates(row_model):
    """A site of a further plate factorises only over that plate: what outside reads it, or None."""
    latent = {name: site.value for name, site in row_model.latent.items()}
    if all(np.ndim(site.value) - site.event_dim <= 1 for site in row_model.latent.values()):
        return None
    plates = {}

    def run(**latent):
        values = {**row_model.parameters, **row_model.visible_values, **latent}
        model_trace = row_model.trace_at(values)
        for site in filter(row_model.owns, model_trace.values()):
            plates[site["name"]] = plates_of(site)
        return row_model.site_log_densities(model_trace)

    for term, labels in eval_provenance(run, **latent).items():
        for name in sorted(labels):
            outside = plates[name] - plates[term]
            if outside:
                return (
                    f"Enumerated(): '{term}' reads the latent site '{name}' outside its plate(s) "
                    f"{sorted(outside)}, so that the sum over '{name}' does not factorise. Put the "
                    "term inside the plate, one value for each unit; or, where it couples the "
                    "units, give them event dimensions instead of a plate, "
                    "`Counting(event_shape=...)`, which are enumerated jointly."
                )
    return None


def _event_sites(row_model):
    return [name for name, site in row_model.latent.items() if site.fn.event_shape]


def _event_states(row_model):
    """All joint states of the latent sites with event dimensions, states leading."""
    return joint_states(row_model, _event_sites(row_model), "Enumerated")


def _state_log_densities(row_model, params, values, states):
    """log p̃ of every row at each of the ``states``, scalar latents summed out: (states, rows)."""

    def at_state(state):
        latent = in_all_rows(row_model, state)
        return _sum_scalar_sites(row_model, params, {**values, **latent})

    return jax.vmap(at_state)(states)


def _enumerating(row_model, values, scalar):
    """The model at given values, its scalar discrete sites to be enumerated by NumPyro."""

    def configure(site):
        # All other sites have values, whatever their own `infer` says.
        return {"enumerate": "parallel" if site["name"] in scalar else None}

    return infer_config(row_model.substituted(values), configure)


def _sum_scalar_sites(row_model, params, values):
    """Sum scalar discrete sites out of the row log-joint by funsor's sum-product, per row."""
    scalar = [name for name, site in row_model.latent.items() if not site.fn.event_shape]
    if not scalar:
        return row_model.log_density(params, values)
    import funsor

    enum, plate_to_enum_plate, packed_trace = funsor_tools()

    num_plate_dims = max(
        [-row_model.dim] + [np.ndim(s.value) - s.event_dim for s in row_model.latent.values()]
    )

    model = enum(_enumerating(row_model, {**params, **values}, scalar), -num_plate_dims - 1)
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
        eliminate=frozenset(scalar) | (plates - {row_model.plate}),
        plates=plates,
    )
    rows = result.align((row_model.plate,)) if result.inputs else result
    return jnp.broadcast_to(rows.data, (row_model.num_rows,))
