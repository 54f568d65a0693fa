# SPDX-License-Identifier: Apache-2.0
r"""The bias that the gap of a guide brings into VaES and VaGES, and bounds of it, row by row.

For :math:`f_i = ∂_{v_i} \log\tilde p(v, h)` and :math:`\mathrm{TV} ≤ \sqrt{\mathrm{KL}/2}` the
total variation of guide q and posterior p, VaES, whose mean is :math:`E_q f`, is off by

.. math:: |E_q f_i - E_p f_i| ≤ \operatorname{range}_h(f_i)\, \mathrm{TV}, \qquad
    \|E_q f - E_p f\| ≤ 2 F\, \mathrm{TV}, \qquad F = \sup_h \|f\|

and with :math:`g_j = ∂_{θ_j} \log\tilde p` and :math:`m_{ij} = ∂_{v_i} ∂_{θ_j} \log\tilde p` the
bias of VaGES, whose mean is :math:`E_q m_{ij} + \operatorname{Cov}_q(f_i, g_j)`, is at most

.. math:: \big[\operatorname{range}(m_{ij}) + \tfrac32 \operatorname{range}(f_i)
    \operatorname{range}(g_j)\big]\, \mathrm{TV} \quad \text{and} \quad (2 M + 6 F G)\, \mathrm{TV}

(the first by taking the middles of their ranges off f and g, which no covariance notices).

Reference: Bao et al., ICML 2021 (the rates).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from numpyro_ebm.model.row_model import RowModel
from numpyro_ebm.printed import brief
from numpyro_ebm.types import Params

__all__ = ["BiasBound", "bias_bounds"]


class BiasBound(NamedTuple):
    """The bias that a guide brings into an estimate, by row, (rows,) each.

    - **bias** - norm of the bias, in units of the score (or of its gradient in θ).
    - **range_bound** - norm of the bounds by coordinate, from the ranges of what is averaged.
    - **norm_bound** - the bound from the largest norms of what is averaged.

    Where the latents were enumerated all three are exact, and the bounds bound. Else the bias is an
    importance estimate, and ranges and norms are those over the particles, which may miss larger
    ones, times an estimate of the total variation: estimates of the bounds, and themselves none.
    """

    bias: jax.Array
    range_bound: jax.Array
    norm_bound: jax.Array

    __repr__ = brief


class _Terms(NamedTuple):
    """What is averaged over h, by row; all but the score are ``None`` unless they are asked for.

    - **score** - f, (rows, D).
    - **slope** - g, (rows, P).
    - **mixed** - m, (rows, D P).
    - **product** - the products of f and g, (rows, D P).
    """

    score: jax.Array
    slope: Any = None
    mixed: Any = None
    product: Any = None


class _Summary(NamedTuple):
    """Over all points, of every term: means under q and p, lowest, highest and largest norm."""

    under_q: _Terms
    under_p: _Terms
    low: _Terms
    high: _Terms
    norm: _Terms


def bias_bounds(
    row_model: RowModel,
    params: Params,
    points: Any,
    q: jax.Array,
    p: jax.Array,
    total_variation: jax.Array,
    gradient: bool,
) -> tuple[BiasBound | None, BiasBound | None]:
    """Biases of VaES and VaGES, and their bounds.

    :param points: values of the latent sites, points leading.
    :param q, p: their weights under the guide and under the posterior, (points, rows).
    :param total_variation: of guide and posterior, (rows,).
    :param bool gradient: whether VaGES is asked for.
    :return: two :class:`BiasBound`; ``None`` for VaGES unless it is asked for, and for both if a
        visible site is discrete.
    """
    if any(site.is_discrete for site in row_model.visible.values()):
        return None, None
    under_q, under_p, low, high, norm = _summarise(
        _terms(row_model, params, gradient), points, q, p
    )
    width = jax.tree.map(lambda a, b: b - a, low, high)
    vaes = BiasBound(
        _length(under_q.score - under_p.score),
        _length(width.score) * total_variation,
        2 * norm.score * total_variation,
    )
    if not gradient:
        return vaes, None
    ranges = width.mixed + 1.5 * _products(width.score, width.slope)
    return vaes, BiasBound(
        _length(_mean_of_vages(under_q) - _mean_of_vages(under_p)),
        _length(ranges) * total_variation,
        (2 * norm.mixed + 6 * norm.score * norm.slope) * total_variation,
    )


def _terms(row_model, params, gradient):
    """The terms as a function of the latent sites."""
    here = row_model.unconstrain_visible()
    own = {name: params[name] for name in row_model.parameters}

    def score(own, latent):
        def total(u):
            return jnp.sum(row_model.unconstrained_log_density({**params, **own}, u, latent))

        return row_model.flatten(jax.grad(total)(here))

    def log_density(own, latent):
        return row_model.log_density({**params, **own}, {**row_model.visible_values, **latent})

    def terms(latent):
        f = score(own, latent)
        if not gradient:
            return _Terms(f)
        g = _side_by_side(jax.jacrev(log_density)(own, latent), 1)
        m = _side_by_side(jax.jacrev(score)(own, latent), 2)
        return _Terms(f, g, jnp.reshape(m, (len(m), -1)), _products(f, g))

    return terms


def _summarise(terms, points, q, p):
    """One pass over the points, of which there may be too many to hold the terms of all."""
    first = jax.eval_shape(terms, jax.tree.map(lambda x: x[0], points))

    def blank(value):
        return jax.tree.map(lambda x: jnp.full(x.shape, value, x.dtype), first)

    no_norm = jax.tree.map(lambda x: jnp.zeros(len(x)), first)
    start = _Summary(blank(0.0), blank(0.0), blank(jnp.inf), blank(-jnp.inf), no_norm)

    def step(so_far, point):
        latent, at_q, at_p = point
        new = terms(latent)
        norm = jax.tree.map(lambda x: jnp.linalg.norm(x, axis=1), new)
        return _Summary(
            jax.tree.map(lambda mean, x: mean + at_q[:, None] * x, so_far.under_q, new),
            jax.tree.map(lambda mean, x: mean + at_p[:, None] * x, so_far.under_p, new),
            jax.tree.map(jnp.minimum, so_far.low, new),
            jax.tree.map(jnp.maximum, so_far.high, new),
            jax.tree.map(jnp.maximum, so_far.norm, norm),
        ), None

    summary, _ = lax.scan(step, start, (points, q, p))
    return summary


def _mean_of_vages(mean):
    """E m + Cov(f, g), from the means of the terms."""
    return mean.mixed + mean.product - _products(mean.score, mean.slope)


def _products(f, g):
    """Products of all pairs of coordinates: (rows, D) and (rows, P) to (rows, D P)."""
    return jnp.reshape(f[:, :, None] * g[:, None], (len(f), -1))


def _length(x):
    """Norm of every row."""
    return jnp.linalg.norm(x, axis=1)


def _side_by_side(jacobian, batch_dims):
    """Jacobians of a dict of parameters as one array: (rows, P) or (rows, D, P)."""
    leaves = [jacobian[name] for name in sorted(jacobian)]
    parts = [jnp.reshape(x, (*jnp.shape(x)[:batch_dims], -1)) for x in leaves]
    return jnp.concatenate(parts, -1)
