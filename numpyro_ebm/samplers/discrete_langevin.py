# SPDX-License-Identifier: Apache-2.0
r"""Discrete Langevin proposals on finite values (DULA, DMALA), in BlackJAX's shape.

.. math:: q_i(x_i' \mid x) \propto \exp\Big(\tfrac12 Δ_i(x_i') - \frac{d(x_i', x_i)}{2α}\Big),
    \qquad \text{all coordinates at once}

where :math:`Δ_i(k)` is the change of :math:`\log π` when coordinate i becomes k, to first order
:math:`∂_i \log π(x) (k - x_i)`, and d a squared distance. One gradient moves all coordinates; the
Metropolis-Hastings test (DMALA) makes the stationary law exact whatever the gradient is worth.
Without it (DULA) the law is biased, by an amount that vanishes with α for quadratic
:math:`\log π`. Use it for large discrete models whose coordinates interact too much for
:mod:`numpyro_ebm.samplers.block_gibbs` to draw many of them at once.

``differences="gradient"`` takes the values for points on a line, :math:`d = (x_i' - x_i)^2`: right
for binary and ordinal coordinates. ``differences="exact"`` evaluates every :math:`Δ_i(k)` and has
:math:`d = 1[x_i' \ne x_i]`: for nominal values, and for densities without a gradient. Where
log π is affine in the indicators of each coordinate they are one gradient as well.

Reference: Zhang, Liu, Liu, *A Langevin-like sampler for discrete distributions*, ICML 2022.
"""

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax import lax
from jax.typing import ArrayLike

from numpyro_ebm._compat import SamplingAlgorithm, build_sampling_algorithm
from numpyro_ebm.program.multi_affine import MultiAffine, value_table
from numpyro_ebm.samplers.chromatic_gibbs import MAX_BATCH
from numpyro_ebm.samplers.indicator_gibbs import conditional_logits
from numpyro_ebm.samplers.positions import flatten_sites
from numpyro_ebm.types import LogDensity, SiteValues

__all__ = [
    "DiscreteLangevinInfo",
    "DiscreteLangevinChainState",
    "as_top_level_api",
    "build_kernel",
    "init",
]


class DiscreteLangevinChainState(NamedTuple):
    """State of all chains, one a row.

    - **position** - dict of arrays of shape (rows, ...).
    - **logdensity** - log π of every row, of shape (rows,).
    - **differences** - Δ of shape (K, rows, coordinates), the sites of a row flattened one after
      the other, in alphabetical order.
    """

    position: SiteValues
    logdensity: jax.Array
    differences: jax.Array


class DiscreteLangevinInfo(NamedTuple):
    """Information on one step.

    - **acceptance_rate** - acceptance probability of every row, (rows,); 1 without the test.
    - **is_accepted** - rows that took their proposal, (rows,).
    - **is_divergent** - rows whose proposal had no finite density or no finite Δ, (rows,).
    """

    acceptance_rate: jax.Array
    is_accepted: jax.Array
    is_divergent: jax.Array


def init(
    position: SiteValues,
    logdensity_fn: LogDensity,
    values: Mapping[str, npt.ArrayLike],
    differences: Literal["gradient", "exact"] = "gradient",
    form: MultiAffine | None = None,
) -> DiscreteLangevinChainState:
    """State of the chains at a position.

    :param dict position: arrays of shape (rows, ...) by name.
    :param logdensity_fn: maps such a dict to log π of shape (rows,), row by row.
    :param dict values: the possible values of one coordinate, of shape (K,), by name.
    :param str differences: "gradient" or "exact".
    :param form: log π in the indicators of all sites in alphabetical order, where it is known:
        exact differences then cost a gradient.
    """
    names = sorted(position)  # compiled functions sort dicts as well
    flat, unflatten = flatten_sites(position, names)
    table, _ = value_table(position, {name: values[name] for name in names})

    def log_density(x):
        return logdensity_fn(unflatten(x))

    dtype = jnp.result_type(flat.dtype, float)
    if differences == "gradient":
        logdensity, pullback = jax.vjp(log_density, flat.astype(dtype))
        (gradient,) = pullback(jnp.ones_like(logdensity))
        change = gradient * (jnp.asarray(table.T, dtype)[:, None] - flat)
    elif form is not None:
        logdensity = log_density(flat)
        logits = jnp.moveaxis(conditional_logits(form, position), -1, 0)
        here = jnp.where(table.T[:, None] == flat, logits, -jnp.inf)
        change = logits - jnp.max(here, 0)
    else:
        logdensity = log_density(flat)
        coordinates = jnp.broadcast_to(jnp.arange(flat.shape[1]), table.T.shape)
        batch_size = max(1, MAX_BATCH // flat.size)
        densities = lax.map(
            lambda at: log_density(flat.at[:, at[0]].set(at[1])),
            (coordinates.ravel(), jnp.asarray(table.T.ravel(), flat.dtype)),
            batch_size=batch_size,
        )
        densities = densities.reshape(*table.T.shape, len(flat))
        change = jnp.swapaxes(densities, 1, 2) - logdensity[:, None]
    logdensity = jnp.asarray(logdensity, jnp.result_type(logdensity, float))
    return DiscreteLangevinChainState(position, logdensity, change)


def build_kernel(
    adjusted: bool = True, differences: Literal["gradient", "exact"] = "gradient"
) -> Callable[..., tuple[DiscreteLangevinChainState, DiscreteLangevinInfo]]:
    """Build the kernel ``(rng_key, state, logdensity_fn, step_size, values, form)``.

    It returns ``(state, info)``; ``form`` is that of :func:`init`.

    :param bool adjusted: whether to make the Metropolis-Hastings test.
    :param str differences: "gradient" or "exact".
    """

    def kernel(rng_key, state, logdensity_fn, step_size, values, form=None):
        names = sorted(state.position)
        flat, unflatten = flatten_sites(state.position, names)
        table, is_value = value_table(state.position, {name: values[name] for name in names})
        choices = jnp.asarray(table.T, flat.dtype)[:, None]  # (K, 1, coordinates)
        forbidden = jnp.where(is_value.T, 0.0, -jnp.inf)[:, None]

        scale = jnp.asarray(step_size)[..., None]  # of all rows, or one each

        def log_proposal(x, change):
            distance = (choices - x) ** 2 if differences == "gradient" else choices != x
            logits = 0.5 * change - distance / (2 * scale) + forbidden
            return jax.nn.log_softmax(logits.astype(change.dtype), 0)

        def at(logits, index):
            return jnp.sum(jnp.take_along_axis(logits, index[None], 0)[0], -1)

        key_proposal, key_test = jax.random.split(rng_key)
        forward = log_proposal(flat, state.differences)
        index = jax.random.categorical(key_proposal, forward, axis=0)  # (rows, coordinates)
        proposal = jnp.take_along_axis(jnp.broadcast_to(choices, forward.shape), index[None], 0)[0]
        new = init(unflatten(proposal), logdensity_fn, values, differences, form)
        is_divergent = ~jnp.isfinite(new.logdensity)
        if differences == "gradient":
            is_divergent |= ~jnp.all(jnp.isfinite(new.differences), (0, 2))
        if not adjusted:
            one = jnp.ones_like(new.logdensity)
            return new, DiscreteLangevinInfo(one, one > 0, is_divergent)
        here = jnp.argmax((choices == flat) & (forbidden == 0), 0)
        backward = log_proposal(proposal, new.differences)
        log_ratio = new.logdensity - state.logdensity + at(backward, here) - at(forward, index)
        log_ratio = jnp.where(is_divergent | jnp.isnan(log_ratio), -jnp.inf, log_ratio)
        acceptance_rate = jnp.exp(jnp.minimum(log_ratio, 0.0))
        is_accepted = jax.random.uniform(key_test, log_ratio.shape, log_ratio.dtype)
        is_accepted = is_accepted < acceptance_rate
        position = unflatten(jnp.where(is_accepted[:, None], proposal, flat))
        new = DiscreteLangevinChainState(
            position,
            jnp.where(is_accepted, new.logdensity, state.logdensity),
            jnp.where(is_accepted[:, None], new.differences, state.differences),
        )
        return new, DiscreteLangevinInfo(acceptance_rate, is_accepted, is_divergent)

    return kernel


def as_top_level_api(
    logdensity_fn: LogDensity,
    step_size: ArrayLike,
    values: Mapping[str, npt.ArrayLike],
    *,
    adjusted: bool = True,
    differences: Literal["gradient", "exact"] = "gradient",
) -> SamplingAlgorithm:
    """A BlackJAX ``SamplingAlgorithm`` with ``init`` and ``step``.

    :param logdensity_fn: maps a dict of arrays of shape (rows, ...) to log π of shape (rows,), row
        by row.
    :param step_size: α, in squared units of the values.
    :param dict values: the possible values of one coordinate, of shape (K,), by name.
    :param bool adjusted: whether to make the Metropolis-Hastings test.
    :param str differences: "gradient" or "exact".

    **Example**

    >>> import jax, jax.numpy as jnp
    >>> from numpyro_ebm.samplers.discrete_langevin import as_top_level_api
    >>> log_density = lambda x: jnp.sum(x["s"], -1) ** 2 / 10
    >>> dmala = as_top_level_api(log_density, 0.5, {"s": [0, 1, 2]})
    >>> state, info = dmala.step(jax.random.key(0), dmala.init({"s": jnp.zeros((3, 4), int)}))
    >>> state.position["s"].shape, info.acceptance_rate.shape
    ((3, 4), (3,))
    """
    values = {name: np.asarray(x) for name, x in values.items()}

    def start(position, logdensity_fn):
        return init(position, logdensity_fn, values, differences)

    kernel = build_kernel(adjusted, differences)
    return build_sampling_algorithm(kernel, start, logdensity_fn, kernel_args=(step_size, values))
