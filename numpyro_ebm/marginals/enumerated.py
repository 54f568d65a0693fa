# SPDX-License-Identifier: Apache-2.0
r"""Sum discrete latent sites out exactly.

.. math:: \log\tilde p(v; θ) = \log \sum_h \tilde p(v, h; θ)

Scalar latent sites, in the data plate or in further plates, are summed by NumPyro's funsor backend:
the sum over a plate of hidden units factorises, so that 100 units cost 100 sums of two terms and
not one of 2^100, where the operations of the energy show that no unit reads another. Binary sites
with event dimensions in which log p̃ is affine, as in restricted Boltzmann machines, factorise too,

.. math:: \log \sum_{h \in \{0, 1\}^H} e^{a + b^\top h} = a + \sum_j \operatorname{softplus}(b_j),
    \qquad a = \log\tilde p(v, 0), \quad b = ∇_h \log\tilde p(v, h),

for one gradient whatever H is; that it is affine is read off the operations of the energy. Other
sites with event dimensions, and units of a plate that do read one another, are enumerated jointly,
state by state. Of several layers of binary units, as in deep Boltzmann machines, some are
enumerated, and the others are affine given them: the choice with the fewest states is taken.
"""

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logsumexp

from numpyro_ebm.errors import check_integer
from numpyro_ebm.marginals.base import ExactMarginal
from numpyro_ebm.marginals.plated_sums import (
    coupled_sites,
    draw_scalar_sites,
    leaving_plates,
    sum_scalar_sites,
)
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

__all__ = ["Enumerated"]


class Enumerated(ExactMarginal):
    """The exact marginal of a model whose latent sites are all discrete.

    :param int max_states: the most joint states of latent sites with event dimensions, per row;
        binary units that do not interact given the others are not counted, for their sum
        factorises.
    :raises ModelError: when used on continuous latents, or on more states than ``max_states``.

    **Example**

    >>> import numpyro_ebm as ebm
    >>> ebm.Enumerated()
    Enumerated(max_states=65536)
    """

    def __init__(self, *, max_states: int = 65_536):
        check_integer("Enumerated", max_states=max_states)
        self.max_states = max_states

    def why_not(self, row_model: RowModel) -> str | None:
        if not row_model.latent:
            return "Enumerated() is for discrete latent sites; use `Exact()` here."
        affine = _affine_sites(row_model)
        if len(affine) == len(row_model.latent):
            return None
        for name, site in row_model.latent.items():
            if not site.is_discrete:
                return (
                    f"Enumerated() cannot sum out the continuous latent site '{name}'; use "
                    "`GaussianLatents()`, or `VaGES()` with a guide."
                )
            if not site.fn.has_enumerate_support:
                return f"The latent site '{name}' has infinitely many values."
            if site.fn.event_shape and name not in affine:
                if np.size(site.value) != row_model.num_rows * math.prod(site.fn.event_shape):
                    return (
                        f"The latent site '{name}' has event dimensions inside a further plate; "
                        "make them plates as well (they factorise), or all event dimensions."
                    )
        leaving = leaving_plates(row_model)
        if leaving:
            return leaving
        states = self.num_states(row_model)
        if states > self.max_states:
            why = coupled_sites(row_model)
            if why:
                return (
                    f"Enumerated(): {' and '.join(sorted(set(why.values())))}, as far as its "
                    f"operations tell, so that {sorted(why)} are summed jointly: with "
                    f"{states:.6g} states per row, more than max_states={self.max_states}. Write "
                    "each unit's term from that unit alone, or use `VaGES()`."
                )
            return (
                f"The latent sites {sorted(_joint_sites(row_model))} have {states:.6g} joint "
                f"states per row, more than max_states={self.max_states}. If the energy is a sum "
                "over units, declare them in a plate, "
                '`with numpyro.plate("units", n, dim=-2): h = numpyro.sample("h", Counting())`, '
                "with the units' energy inside it: the sum then factorises. Else use `VaGES()`."
            )
        return None

    def num_states(self, row_model: RowModel) -> float:
        return num_joint_states(row_model, _joint_sites(row_model), "Enumerated")

    def log_density(self, row_model: RowModel, params: Params, values: SiteValues) -> jax.Array:
        states = _joint_states(row_model)
        if not states:
            return _sum_others(row_model, params, values)
        return logsumexp(_state_log_densities(row_model, params, values, states), axis=0)

    def conditional(
        self, row_model: RowModel, params: Params, values: SiteValues
    ) -> Callable[[jax.Array], SiteValues]:
        """As in the base class, for all sites but units that are summed in their plates."""
        affine, states = _affine_sites(row_model), _joint_states(row_model)
        units = row_model.with_latent(affine)
        log_densities = _state_log_densities(row_model, params, values, states) if states else 0.0
        logits = {} if states else _unit_logits(units, params, values)[1]

        def draw(rng_key) -> SiteValues:
            key_units, drawn, of_units = rng_key, {}, logits
            if states:
                key_state, key_units = jax.random.split(rng_key) if affine else (rng_key, rng_key)
                chosen = jax.random.categorical(key_state, log_densities, axis=0)  # (rows,)
                drawn = row_model.from_rows({name: x[chosen] for name, x in states.items()})
                if affine:
                    of_units = _unit_logits(units, params, {**values, **drawn})[1]
            keys = jax.random.split(key_units, len(affine))
            return drawn | {
                name: jax.random.bernoulli(key, jax.nn.sigmoid(x))
                for key, (name, x) in zip(keys, of_units.items(), strict=True)
            }

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
        scalar = _scalar_sites(row_model)
        joint = len(row_model.latent) > len(scalar)
        key_joint = key_scalar = rng_key
        if values or scalar:
            key_joint, key_scalar = jax.random.split(rng_key)
        draws = {}
        if joint:
            draws = super().draw(key_joint, row_model, params, values, num_draws)
        if scalar:
            given = {**values, **draws}
            draws |= draw_scalar_sites(key_scalar, row_model, params, given, scalar, num_draws)
        return draws


class _Parts(NamedTuple):
    """Names of the latent sites by how they are summed."""

    joint: tuple[str, ...]  # state by state
    affine: tuple[str, ...] = ()  # binary units that are independent given all other sites
    scalar: tuple[str, ...] = ()  # units in plates that are independent given the joint ones


def _latent_parts(row_model):
    """The parts of the latent sites of a model with the fewest joint states."""
    return row_model.remember("parts", lambda: _find_parts(row_model))


def _find_parts(row_model):
    binary = [
        name
        for name, site in row_model.latent.items()
        if site.fn.event_shape and site.is_discrete and is_binary(site)
    ]
    sizes = range(len(binary), 0, -1) if len(binary) <= 4 else (len(binary), 1)
    best = None
    for affine in itertools.chain(*(itertools.combinations(binary, size) for size in sizes)):
        found = _Parts(tuple(name for name in row_model.latent if name not in affine), affine)
        if _has_fewer(row_model, found, best) and _is_affine(row_model.with_latent(affine)):
            best = found
            if not best.joint:
                return best
    coupled = coupled_sites(row_model)
    joint = [k for k, site in row_model.latent.items() if site.fn.event_shape or k in coupled]
    scalar = [name for name in row_model.latent if name not in joint]
    plain = _Parts(tuple(joint), (), tuple(scalar))
    return best if best is not None and _has_fewer(row_model, best, plain) else plain


def _has_fewer(row_model, parts, other):
    """Whether the joint sites of ``parts`` can be counted, and have fewer states."""
    sites = [row_model.latent[name] for name in parts.joint]
    if not all(site.is_discrete and site.fn.has_enumerate_support for site in sites):
        return False
    if other is None:
        return True
    one, two = (num_joint_states(row_model, x.joint, "Enumerated") for x in (parts, other))
    return one < two


def _affine_sites(row_model):
    return _latent_parts(row_model).affine


def _is_affine(row_model):
    """Whether log p̃ is affine in the latent sites, which are binary, at any value of the others."""
    others = {name: site.value for name, site in row_model.visible.items()}

    def log_density(latent):
        return row_model.log_density(row_model.parameters, {**others, **latent})

    try:
        found = structure(log_density, _units(row_model))
    except TypeError:  # an energy that uses its units as indices or flags, and not as numbers
        return False
    return found.degree <= 1 and found.true_gradient


def _unit_logits(row_model, params, values):
    """log p̃(v, h = 0) of every row, and the log-odds of every unit, where they are affine."""

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


def _joint_sites(row_model):
    """Sites that are enumerated jointly."""
    return _latent_parts(row_model).joint


def _scalar_sites(row_model):
    """Units in plates that are summed where they stand."""
    return _latent_parts(row_model).scalar


def _sum_others(row_model, params, values):
    """log p̃ of every row at given values of the joint sites, all others summed out: (rows,)."""
    affine = _affine_sites(row_model)
    if not affine:
        return sum_scalar_sites(row_model, params, values, _scalar_sites(row_model))
    units = row_model.with_latent(affine)
    without, logits = _unit_logits(units, params, values)
    return without + sum(
        row_model.sum_to_rows(_sum_event(units.latent[name], jax.nn.softplus(x)))
        for name, x in logits.items()
    )


def _joint_states(row_model):
    """All joint states of these sites, states leading."""
    return joint_states(row_model, _joint_sites(row_model), "Enumerated")


def _state_log_densities(row_model, params, values, states):
    """log p̃ of every row at each of the ``states``, all others summed out: (states, rows)."""

    def at_state(state):
        return _sum_others(row_model, params, {**values, **in_all_rows(row_model, state)})

    return jax.vmap(at_state)(states)
