# SPDX-License-Identifier: Apache-2.0
r"""Replica exchange (parallel tempering) with MALA moves, in BlackJAX's shape.

Replicas run side by side at inverse temperatures :math:`1 = β_1 > β_2 > … > β_K`,

.. math:: \log π_β(x) = \log b(x) + β\,\ell(x)

for a base log b and a log-likelihood ℓ (minus the energy), and neighbours swap their positions with

.. math:: α_k = \min\bigl\{1,\ e^{(β_k - β_{k+1})(\ell(x_{k+1}) - \ell(x_k))}\bigr\}

in even pairs and odd pairs by turns, whatever the outcome of the last turn. The order makes a
replica travel up and down the ladder, where choosing pairs at random would make it diffuse. Hot
replicas cross between modes, and swaps hand what they find down to β = 1.

Values and gradients of log b and ℓ are kept apart, so that a step costs one evaluation of each for
every replica and a swap costs none.

Reference: Swendsen, Wang 1986; Geyer 1991; the order of pairs, Okabe et al. 2001, and Syed,
Bouchard-Côté, Deligiannidis, Doucet, *Non-reversible parallel tempering*, 2022. The moves are made
of BlackJAX's parts.
"""

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from numpyro_ebm._compat import (
    DiffusionState,
    SamplingAlgorithm,
    build_sampling_algorithm,
    overdamped_langevin,
    proposal,
)
from numpyro_ebm.types import LogDensity

__all__ = [
    "Replica",
    "TemperingInfo",
    "TemperingState",
    "as_top_level_api",
    "build_kernel",
    "equal_rejection_ladder",
    "evaluate",
    "init",
    "move",
    "swap",
]


class Replica(NamedTuple):
    """A position, and the two parts of its log-density.

    - **position** - a pytree of arrays.
    - **logprior**, **logprior_grad** - log b and its gradient.
    - **loglikelihood**, **loglikelihood_grad** - ℓ and its gradient.
    """

    position: Any
    logprior: jax.Array
    loglikelihood: jax.Array
    logprior_grad: Any
    loglikelihood_grad: Any


class TemperingState(NamedTuple):
    """State of one ladder: replicas lead, the first at β = 1.

    - **replicas** - a :class:`Replica` whose arrays have the shape (K, ...).
    - **step** - counter; its parity says which pairs swap next.
    """

    replicas: Replica
    step: jax.Array


class TemperingInfo(NamedTuple):
    """Information on one step.

    - **acceptance_rate** - of the moves, (K,).
    - **swap_probability** - α of every pair of neighbours, swapped at this turn or not, (K - 1,).
    - **is_swapped** - which pairs swapped, (K - 1,).
    """

    acceptance_rate: jax.Array
    swap_probability: jax.Array
    is_swapped: jax.Array


def evaluate(position: Any, logprior_fn: LogDensity, loglikelihood_fn: LogDensity) -> Replica:
    """A :class:`Replica` at a position."""
    logprior, logprior_grad = jax.value_and_grad(logprior_fn)(position)
    loglikelihood, loglikelihood_grad = jax.value_and_grad(loglikelihood_fn)(position)
    return Replica(position, logprior, loglikelihood, logprior_grad, loglikelihood_grad)


def init(positions: Any, logprior_fn: LogDensity, loglikelihood_fn: LogDensity) -> TemperingState:
    """State of a ladder at positions of shape (K, ...)."""
    replicas = jax.vmap(lambda x: evaluate(x, logprior_fn, loglikelihood_fn))(positions)
    return TemperingState(replicas, jnp.array(0))


def move(
    rng_key: jax.Array,
    replica: Replica,
    logprior_fn: LogDensity,
    loglikelihood_fn: LogDensity,
    inverse_temperature: ArrayLike,
    step_size: ArrayLike,
) -> tuple[Replica, jax.Array]:
    """One MALA step of one replica: the new :class:`Replica` and its acceptance probability."""

    def log_density(replica):
        return replica.logprior + inverse_temperature * replica.loglikelihood

    def gradient(replica):
        return jax.tree.map(
            lambda g, h: g + inverse_temperature * h,
            replica.logprior_grad,
            replica.loglikelihood_grad,
        )

    def transition_energy(old, new):
        """Minus the log-density of ``new`` and of the reverse proposal."""
        drift = gradient(new)
        squares = jax.tree.map(
            lambda x, y, g: jnp.sum((x - y - step_size * g) ** 2), old.position, new.position, drift
        )
        return -log_density(new) + jax.tree.reduce(operator.add, squares) / (4 * step_size)

    def parts(position):
        replica = evaluate(position, logprior_fn, loglikelihood_fn)
        return replica, None

    key_noise, key_accept = jax.random.split(rng_key)
    start = DiffusionState(replica.position, jnp.nan, gradient(replica))
    one_step: Any = overdamped_langevin(parts)
    proposed = one_step(key_noise, start, step_size).logdensity
    ratio = proposal.compute_asymmetric_acceptance_ratio(transition_energy)(replica, proposed)
    replica, info = proposal.static_binomial_sampling(key_accept, ratio, replica, proposed)
    return replica, info[1]


def swap(
    rng_key: jax.Array,
    replicas: Replica,
    inverse_temperatures: jax.Array,
    parity: ArrayLike,
    visited: Any,
) -> tuple[Replica, Any, jax.Array, jax.Array]:
    """Swap neighbours of one ladder, the even pairs or the odd ones.

    :param replicas: a :class:`Replica` whose arrays have the shape (K, ...).
    :param inverse_temperatures: β, of shape (K,).
    :param parity: 0 or 1, the parity of the colder index of the pairs.
    :param visited: any pytree of arrays (K, ...) that travels with the replicas.
    :return: replicas, ``visited``, α of every pair and whether it swapped, both (K - 1,).
    """
    energy = replicas.loglikelihood
    ratio = (inverse_temperatures[:-1] - inverse_temperatures[1:]) * (energy[1:] - energy[:-1])
    ratio = jnp.where(jnp.isnan(ratio), -jnp.inf, ratio)  # infinite energies on both sides
    pairs = jnp.arange(len(ratio))
    uniform = jax.random.uniform(rng_key, ratio.shape, ratio.dtype)
    swapped = (pairs % 2 == parity) & (jnp.log(uniform) < ratio)
    no = jnp.zeros(1, bool)
    to_colder, to_hotter = jnp.concatenate([swapped, no]), jnp.concatenate([no, swapped])

    def exchange(x):
        expand = (slice(None),) + (None,) * (jnp.ndim(x) - 1)
        hotter, colder = jnp.roll(x, -1, 0), jnp.roll(x, 1, 0)
        return jnp.where(to_colder[expand], hotter, jnp.where(to_hotter[expand], colder, x))

    replicas, visited = jax.tree.map(exchange, (replicas, visited))
    return replicas, visited, jnp.exp(jnp.minimum(ratio, 0.0)), swapped


def build_kernel() -> Callable[..., tuple[TemperingState, TemperingInfo]]:
    """Build the kernel of one ladder.

    :return: ``(rng_key, state, logprior_fn, loglikelihood_fn, inverse_temperatures, step_sizes)
        -> (state, info)``, with β and ε of shape (K,).
    """

    def kernel(rng_key, state, logprior_fn, loglikelihood_fn, inverse_temperatures, step_sizes):
        key_move, key_swap = jax.random.split(rng_key)
        keys = jax.random.split(key_move, len(inverse_temperatures))
        replicas, accept = jax.vmap(
            lambda key, x, beta, size: move(key, x, logprior_fn, loglikelihood_fn, beta, size)
        )(keys, state.replicas, inverse_temperatures, step_sizes)
        replicas, _, probability, swapped = swap(
            key_swap, replicas, inverse_temperatures, state.step % 2, ()
        )
        info = TemperingInfo(accept, probability, swapped)
        return TemperingState(replicas, state.step + 1), info

    return kernel


def as_top_level_api(
    logprior_fn: LogDensity,
    loglikelihood_fn: LogDensity,
    inverse_temperatures: jax.Array,
    step_sizes: jax.Array,
) -> SamplingAlgorithm:
    """A BlackJAX ``SamplingAlgorithm`` with ``init`` and ``step``.

    :param logprior_fn: log b of one position.
    :param loglikelihood_fn: ℓ of one position, minus the energy.
    :param inverse_temperatures: β, of shape (K,), from 1 downwards.
    :param step_sizes: ε of every replica, of shape (K,), in squared units of the position.

    **Example**

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from numpyro_ebm.samplers.tempering import as_top_level_api
    >>> beta = jnp.array([1.0, 0.3, 0.1])
    >>> two_modes = lambda x: -8 * (x**2 - 1) ** 2
    >>> tempering = as_top_level_api(lambda x: 0.0 * x, two_modes, beta, 0.02 / beta)
    >>> state = tempering.init(jnp.ones(3))
    >>> state, info = tempering.step(jax.random.key(0), state)
    >>> info.swap_probability.shape
    (2,)
    """

    def kernel(rng_key, state, logprior_fn):
        return build_kernel()(
            rng_key, state, logprior_fn, loglikelihood_fn, inverse_temperatures, step_sizes
        )

    return build_sampling_algorithm(
        kernel, lambda x, logprior_fn: init(x, logprior_fn, loglikelihood_fn), logprior_fn
    )


def equal_rejection_ladder(inverse_temperatures: jax.Array, rejection: jax.Array) -> jax.Array:
    r"""The ladder between the same ends whose neighbours reject swaps equally often.

    The summed rejection rates :math:`Λ(β_k) = \sum_{j<k} (1 - α_j)` measure how far apart two
    inverse temperatures are, nearly whatever lies between. The new ladder takes even steps of Λ.

    :param inverse_temperatures: β, of shape (K,), decreasing.
    :param rejection: mean of 1 - α of every pair, (K - 1,).
    :return: β of shape (K,).

    Reference: Syed, Bouchard-Côté, Deligiannidis, Doucet, *Non-reversible parallel tempering*,
    2022, section 5.
    """
    barrier = jnp.cumsum(jnp.maximum(rejection, 1e-3))  # increasing, so that it can be inverted
    barrier = jnp.concatenate([jnp.zeros(1, barrier.dtype), barrier])
    even = jnp.linspace(0.0, 1.0, len(barrier)) * barrier[-1]
    # Interpolated on a logarithmic scale as far as there is one: ladders are nearly geometric.
    lowest = 1e-3 * inverse_temperatures[-2]
    scale = jnp.log(inverse_temperatures + lowest)
    ladder = jnp.exp(jnp.interp(even, barrier, scale)) - lowest
    ends = inverse_temperatures[jnp.array([0, -1])]
    return ladder.at[jnp.array([0, -1])].set(ends).astype(inverse_temperatures.dtype)
