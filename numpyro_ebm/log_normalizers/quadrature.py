# SPDX-License-Identifier: Apache-2.0
r"""log Z of a fixed model with one or two real coordinates, by quadrature.

.. math:: \log Z ≈ \log \sum_m w_m\, \tilde p(x_m), \qquad x_m = m + L \sinh t_m

on a grid of equidistant t, in the coordinates of a cloud of chains that found the mass. The grid is
refined until it makes no difference, and a coarse one looks for mass far out.

Reference: Trefethen, Weideman, *The exponentially convergent trapezoidal rule*, SIAM Review 2014.
"""

import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logsumexp
from numpyro.util import find_stack_level, not_jax_tracer

from numpyro_ebm.errors import ModelError, QuadratureWarning
from numpyro_ebm.log_normalizers.exact import REACH
from numpyro_ebm.log_normalizers.exploring import diverges, explored
from numpyro_ebm.log_normalizers.path import unflatten
from numpyro_ebm.log_normalizers.result import LogNormalizer

__all__ = ["integrated", "why_not_integrated"]

MOST_REAL = 2  # real coordinates
MOST_NODES = {1: 65_536, 2: 1_024}  # for each coordinate
CHUNK = 16_384  # nodes that are evaluated at once
FARTHEST = 1e8  # reach of a grid that looks for mass far out, in units of the model's scale
TOLERANCE = 1e-3  # an error that is worth a warning
DIVERGES = 0.05  # growth of log Z far out that is no rounding error


def why_not_integrated(target):
    """Why a quadrature does not apply, or an empty string."""
    if not target.real:
        return "the model has no real coordinates"
    if target.size_real > MOST_REAL:
        return (
            f"the real sites {sorted(target.real)} have {target.size_real} coordinates in a row, "
            f"more than {MOST_REAL}"
        )
    if target.discrete:
        try:
            target.sum_out()
        except ModelError as error:
            return str(error)
    return ""


def integrated(rng_key, target):
    """log Z of every problem of a target, a :class:`~numpyro_ebm.log_normalizers.LogNormalizer`.

    :raises ModelError: if the integral diverges.
    """
    target = target.sum_out() if target.discrete else target
    cloud = explored(rng_key, target, target.real, ()).cloud
    size, problems = target.size_real, target.num_problems
    if cloud.is_diagonal:
        cloud = cloud._replace(factor=jax.vmap(jnp.diag)(cloud.factor))
    like = target.placeholder(problems)

    def axis(num_nodes, reach):
        limit = math.asinh(reach)
        t = np.linspace(-limit, limit, num_nodes)
        return np.sinh(t), np.log(2 * limit / (num_nodes - 1) * np.cosh(t))

    def on_grid(num_nodes, reach):
        """Log-terms of all nodes, (nodes, problems), and their standardised coordinates."""
        x, weights = axis(num_nodes, reach)
        nodes, log_weights = (
            np.stack([y.ravel() for y in np.meshgrid(*[column] * size, indexing="ij")], -1)
            for column in (x, weights)
        )
        log_weights = log_weights.sum(-1)
        dtype = cloud.center.dtype

        def log_terms(part):
            z, w = part
            repeated = jnp.repeat(z, problems, axis=0)
            flat = cloud.restore(repeated)
            values = target.log_density(unflatten(flat, like, target.real))
            return jnp.reshape(values, (-1, problems)) + w[:, None] + cloud.log_det

        def values(parts):
            batch_size = max(1, CHUNK // problems)
            one = lambda part: log_terms(jax.tree.map(lambda x: x[None], part))[0]  # noqa: E731
            return jax.lax.map(one, parts, batch_size=batch_size)

        parts = (jnp.asarray(nodes, dtype), jnp.asarray(log_weights, dtype))
        return jax.jit(values)(parts), np.max(np.abs(nodes), -1)

    def log_sum(values, keep, every=1):
        values = jnp.where(keep[:, None], values, -jnp.inf)
        pad = -len(values) % 1024
        values = jnp.pad(values, ((0, pad), (0, 0)), constant_values=-jnp.inf)
        parts = logsumexp(jnp.reshape(values, (-1, 1024, problems)), 1)
        return logsumexp(parts, 0) + size * math.log(every)

    # Is there mass far out? A coarse grid tells.
    values, distance = on_grid(192, FARTHEST)
    values = _known(target, values, distance, 192, size)
    near, far, farthest = (log_sum(values, distance <= r) for r in (REACH, FARTHEST**0.5, FARTHEST))
    tail = farthest - near
    is_known = not_jax_tracer(tail)
    if is_known and np.any(np.asarray(farthest - far) > DIVERGES):
        raise diverges(target.real, "the further the nodes of a quadrature reach, the larger it is")
    reach = REACH
    if not is_known or np.any(np.asarray(tail) > TOLERANCE / 100):
        reach = FARTHEST
    eps = float(jnp.finfo(cloud.center.dtype).eps)
    rounding = lambda x: max(20 * eps, 1e-10) * (1 + jnp.abs(x))  # noqa: E731
    num_nodes, most = (129, MOST_NODES[size] + 1) if is_known else (513, 513)
    while True:
        values, distance = on_grid(num_nodes, reach)
        values = _known(target, values, distance, num_nodes, size)
        value = log_sum(values, distance < np.inf)
        coarse = np.zeros((num_nodes,) * size, bool)
        coarse[(slice(None, None, 2),) * size] = True
        half = log_sum(values, coarse.ravel(), every=2)
        change = jnp.abs(value - half)
        finest = 4 * num_nodes - 3 > most
        if finest or np.all(np.asarray(change < 2 * rounding(value))):
            break
        num_nodes = 4 * num_nodes - 3
    mcse = jnp.maximum(change, rounding(value))
    mcse = mcse + (jnp.maximum(farthest - far, 0.0) if reach == FARTHEST else 0.0)
    if is_known and np.any(np.asarray(mcse) > TOLERANCE):
        warnings.warn(
            QuadratureWarning(
                f"log_normalizer: the last doubling of the nodes of a quadrature (now {num_nodes} "
                f"for each coordinate) moved log Z by {np.max(change):.2g}. Compare with "
                "`method=['quadrature', 'smc']`."
            ),
            stacklevel=find_stack_level(),
        )
    return LogNormalizer(
        value, mcse, math.inf, "quadrature", "none", {"num_nodes": num_nodes, "reach": reach}
    )


def _known(target, values, distance, num_nodes, size):
    """Values without those that are no numbers far out, where there is no mass next to them."""
    bad = jnp.isnan(values) | (values == jnp.inf)
    cleaned = jnp.where(bad, -jnp.inf, values)
    if not not_jax_tracer(values):
        return cleaned
    bad, mass = np.asarray(bad), np.asarray(jax.nn.softmax(cleaned, 0))
    if not np.any(bad):
        return cleaned
    problems = values.shape[1]
    grid = bad.reshape((num_nodes,) * size + (problems,))
    beside = grid.copy()
    for i in range(size):
        for shift in (-1, 1):
            beside |= np.roll(grid, shift, i)
    share = np.where(beside.reshape(bad.shape), mass, 0.0).sum(0)
    if np.any(share > 1e-6) or np.any(bad[distance < 10.0]):
        raise diverges(target.real, "it has mass up to where the energy is no finite number")
    return cleaned
