# SPDX-License-Identifier: Apache-2.0
"""Noise, and derivatives of log p̃, along directions of the visible values."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from numpyro_ebm.marginals.base import Estimate
from numpyro_ebm.objectives.base import Problem
from numpyro_ebm.program.derivatives import constant_once, half_value
from numpyro_ebm.types import Params, SiteValues

__all__ = ["draw_like", "each", "half_square", "second_derivative"]


def draw_like(
    draw: Callable[..., jax.Array], rng_key: jax.Array, sites: SiteValues, *leading: int
) -> SiteValues:
    """Draws of the shapes of the sites, by name.

    :param draw: ``(rng_key, shape, dtype) -> array``, such as ``jax.random.normal``.
    :param rng_key: random key.
    :param dict sites: arrays by site name.
    :param leading: axes in front of those of the sites.
    """
    keys = jax.random.split(rng_key, len(sites))
    return {
        name: draw(key, (*leading, *jnp.shape(x)), jnp.result_type(x))
        for key, (name, x) in zip(keys, sites.items(), strict=True)
    }


def second_derivative(
    params: Params, estimate: Estimate, problem: Problem, direction: SiteValues
) -> jax.Array:
    """Second derivative of the row log-density along one direction, of shape (rows,)."""

    def first(unconstrained):
        return jax.jvp(lambda u: estimate.log_density(params, u), (unconstrained,), (direction,))[1]

    return jax.jvp(first, (problem.unconstrained,), (direction,))[1]


def each(fn: Callable[..., Any], xs: Any) -> Any:
    """``jax.vmap(fn)(xs)``, but for a single one without the axis: fewer of them fuse better."""
    if {len(x) for x in jax.tree.leaves(xs)} == {1}:
        return jax.tree.map(lambda x: x[None], fn(jax.tree.map(lambda x: x[0], xs)))
    return jax.vmap(fn)(xs)


def half_square(
    params: Params,
    estimate: Estimate,
    problem: Problem,
    offset: SiteValues | float = 0.0,
    scale: SiteValues | float = 1.0,
) -> jax.Array:
    r"""Unbiased value and gradient of :math:`\tfrac12 \|c\,s(u; θ) + o\|^2` for every row.

    With :math:`z = c\,s_A + o` from the independent score :math:`s_A`, the value is
    :math:`\tfrac12 z·(c\,s_B + o)` and the gradient :math:`c\,z·∂_θ s_B`: one forward derivative of
    ``log_density`` along z, and one reverse pass through it. Of an exact marginal the two scores
    are the same, and so all later derivatives are right as well.

    :param params: parameters to differentiate in.
    :param Estimate estimate: the marginal.
    :param Problem problem: the point u.
    :param offset: o, a dict like u, or 0.
    :param scale: c, a dict of arrays that broadcast against u, or a number.
    :return: array of shape (rows,).
    """
    unconstrained = problem.unconstrained
    score = estimate.score(unconstrained)

    def by_site(x) -> dict[str, Any]:
        return x if isinstance(x, dict) else dict.fromkeys(unconstrained, x)

    offset, scale = by_site(offset), by_site(scale)
    z = {name: scale[name] * score[name] + offset[name] for name in unconstrained}
    direction = {name: scale[name] * z[name] for name in z}
    _, along = jax.jvp(
        lambda u: estimate.log_density(params, u), (unconstrained,), (constant_once(direction),)
    )
    inner = along + constant_once(problem.row_model.row_dot(z, offset))
    return half_value(inner)
