# SPDX-License-Identifier: Apache-2.0
r"""The exchange algorithm for densities whose normalizer depends on the parameters.

.. math:: \log α = \log\frac{π(θ')}{π(θ)} + \log\frac{\tilde p(x; θ')}{\tilde p(x; θ)}
    + \log\frac{\tilde p(y; θ)}{\tilde p(y; θ')} + \log\frac{q(θ \mid θ')}{q(θ' \mid θ)},
    \qquad y \sim p(\cdot \mid θ')

One fictitious data set y is drawn at the proposal θ', and the unknown Z(θ) and Z(θ') cancel: the
chain has the exact posterior if y is an exact draw, and an approximate one if y is the end of a
Markov chain (*double Metropolis-Hastings*). With bridges y moves on from θ' to θ along
:math:`θ_k = θ' + \frac{k}{K + 1} (θ - θ')`, by transitions T_k that are reversible with respect to
:math:`p(\cdot \mid θ_k)`, and its ratio becomes
:math:`\prod_{k=0}^{K} \tilde p(y_k; θ_{k+1}) / \tilde p(y_k; θ_k)`, which accepts more of the
long moves.

Here log-densities are plain functions of arrays. Several posteriors of independent groups of
parameters (one lattice each) go side by side, every group accepting on its own. A gradient of any
deterministic approximation of the log-posterior makes the proposal a Langevin step, of which the
ratio of proposals takes care exactly.

Reference: Murray, Ghahramani, MacKay, *MCMC for doubly-intractable distributions*, UAI 2006; Liang,
*A double Metropolis-Hastings sampler for spatial models with intractable normalizing constants*,
2010.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from numpyro_ebm._compat import SamplingAlgorithm
from numpyro_ebm.types import LogDensity

__all__ = ["ExchangeInfo", "ExchangeChainState", "as_top_level_api", "build_kernel", "init"]

LONGEST_DRIFT = 5.0  # in whitened coordinates, by root of the dimension


class ExchangeChainState(NamedTuple):
    """State of the chain, a group of parameters a row.

    - **position** - θ, of shape (groups, dimension).
    - **logprior** - log π(θ), (groups,).
    - **logdensity** - log p̃(x; θ) of the data, without log Z, (groups,).
    - **gradient** - of the approximate log-posterior at θ, (groups, dimension); zeros without one.
    """

    position: jax.Array
    logprior: jax.Array
    logdensity: jax.Array
    gradient: jax.Array


class ExchangeInfo(NamedTuple):
    """Information on one step.

    - **acceptance_rate** - acceptance probability, (groups,).
    - **is_accepted** - groups that took their proposal, (groups,).
    - **is_divergent** - groups whose ratio was not a number, which are rejected, (groups,).
    - **proposal** - θ', (groups, dimension).
    - **halfway, fictitious** - the data set y half way, and at the end, before it crosses any
      bridge.
    - **simulation** - what else the simulation of y reported.
    - **log_densities** - log p̃(y; θ') where the auxiliary chain starts (the data), half way and at
      its end, (3, groups).
    - **log_ratios** - log p̃(y; θ') - log p̃(y; θ), likewise.
    """

    acceptance_rate: jax.Array
    is_accepted: jax.Array
    is_divergent: jax.Array
    proposal: jax.Array
    halfway: Any
    fictitious: Any
    simulation: Any
    log_densities: jax.Array
    log_ratios: jax.Array


def no_gradient(position: jax.Array) -> jax.Array:
    """The gradient of a random walk."""
    return jnp.zeros_like(position)


def init(
    position: jax.Array,
    data: Any,
    logprior_fn: LogDensity,
    logdensity_fn: LogDensity,
    gradient_fn: Callable[[jax.Array], jax.Array] = no_gradient,
) -> ExchangeChainState:
    """State of a chain at a position, an array of shape (groups, dimension)."""
    return ExchangeChainState(
        position, logprior_fn(position), logdensity_fn(position, data), gradient_fn(position)
    )


def build_kernel(num_bridges: int = 0) -> Callable[..., tuple[ExchangeChainState, ExchangeInfo]]:
    """Build the kernel of the exchange algorithm.

    ``kernel(rng_key, state, data, logprior_fn, logdensity_fn, simulate_fn, step_size, scale,
    gradient_fn, transition_fn) -> (state, info)``, with

    - ``logprior_fn(position)`` - log π(θ), (groups,),
    - ``logdensity_fn(position, data)`` - log p̃(x; θ), (groups,),
    - ``simulate_fn(rng_key, position)`` - fictitious data of p(· | θ) half way, and at the
      end, and anything that it reports,
    - ``step_size`` - of the proposal, (groups,), in units of
    - ``scale`` - a factor L of the proposal's covariance L Lᵀ, (groups, dimension, dimension),
    - ``gradient_fn(position)`` - gradient of an approximate log-posterior, for Langevin proposals,
    - ``transition_fn(rng_key, position, data)`` - one reversible step on fictitious data, for
      bridges.

    :param int num_bridges: K, the number of bridges.
    """

    def kernel(
        rng_key,
        state,
        data,
        logprior_fn,
        logdensity_fn,
        simulate_fn,
        step_size,
        scale,
        gradient_fn=no_gradient,
        transition_fn=None,
    ):
        key_noise, key_simulate, key_bridges, key_test = jax.random.split(rng_key, 4)
        old, step = state.position, jnp.reshape(step_size, (-1, 1))
        forth = _drift(state.gradient, scale)
        noise = jax.random.normal(key_noise, old.shape, old.dtype)
        move = 0.5 * step**2 * forth + step * noise
        proposal = old + jnp.einsum("gij,gj->gi", scale, move)
        new = init(proposal, data, logprior_fn, logdensity_fn, gradient_fn)
        back = noise + 0.5 * step * (forth + _drift(new.gradient, scale))
        proposal_ratio = 0.5 * jnp.sum(noise**2 - back**2, -1)

        halfway, fictitious, simulation = simulate_fn(key_simulate, proposal)
        at_end, at_halfway = (
            (logdensity_fn(proposal, y), logdensity_fn(old, y)) for y in (fictitious, halfway)
        )
        exchange_ratio = at_end[1] - at_end[0]
        if num_bridges:
            exchange_ratio = _cross_bridges(
                key_bridges, fictitious, proposal, old, logdensity_fn, transition_fn, num_bridges
            )

        log_ratio = new.logprior - state.logprior + new.logdensity - state.logdensity
        log_ratio = log_ratio + exchange_ratio + proposal_ratio
        is_divergent = jnp.isnan(log_ratio)
        log_ratio = jnp.where(is_divergent, -jnp.inf, log_ratio)
        acceptance_rate = jnp.exp(jnp.minimum(log_ratio, 0.0))
        uniform = jax.random.uniform(key_test, log_ratio.shape, log_ratio.dtype)
        is_accepted = uniform < acceptance_rate
        at_start = (new.logdensity, state.logdensity)
        at_new, at_old = map(jnp.stack, zip(at_start, at_halfway, at_end, strict=True))
        state = jax.tree.map(
            lambda a, b: jnp.where(jnp.reshape(is_accepted, (-1,) + (1,) * (a.ndim - 1)), a, b),
            new,
            state,
        )
        info = ExchangeInfo(
            acceptance_rate,
            is_accepted,
            is_divergent,
            proposal,
            halfway,
            fictitious,
            simulation,
            log_densities=at_new,
            log_ratios=at_new - at_old,
        )
        return state, info

    return kernel


def _drift(gradient, scale):
    """The whitened gradient, bounded: in the tails the approximation may be very large."""
    whitened = jnp.einsum("gij,gi->gj", scale, gradient)
    length = jnp.linalg.norm(whitened, axis=-1, keepdims=True)
    longest = LONGEST_DRIFT * gradient.shape[1] ** 0.5
    return whitened * jnp.minimum(1.0, longest / jnp.maximum(length, longest))


def _cross_bridges(rng_key, fictitious, start, end, logdensity_fn, transition_fn, num_bridges):
    """The log-ratio of fictitious data that cross all bridges from θ' to θ."""

    def at(k):
        return start + (end - start) * k / (num_bridges + 1)

    def weight(k, data):
        return logdensity_fn(at(k + 1), data) - logdensity_fn(at(k), data)

    def cross(carry, key_and_k):
        data, total = carry
        key, k = key_and_k
        data = transition_fn(key, at(k), data)
        return (data, total + weight(k, data)), None

    keys = jax.random.split(rng_key, num_bridges)
    first = (fictitious, weight(0, fictitious))
    (_, total), _ = lax.scan(cross, first, (keys, jnp.arange(1, num_bridges + 1)))
    return total


def as_top_level_api(
    logprior_fn: LogDensity,
    logdensity_fn: LogDensity,
    simulate_fn: Callable[..., Any],
    data: Any,
    step_size: ArrayLike,
    *,
    scale: ArrayLike | None = None,
    gradient_fn: Callable[[jax.Array], jax.Array] = no_gradient,
    num_bridges: int = 0,
    transition_fn: Callable[..., Any] | None = None,
) -> SamplingAlgorithm:
    """A BlackJAX ``SamplingAlgorithm`` with ``init`` and ``step``.

    :param logprior_fn: log π of positions of shape (groups, dimension).
    :param logdensity_fn: maps positions and a data set to log p̃, (groups,).
    :param simulate_fn: maps a random key and positions to a fictitious data set.
    :param data: the data set.
    :param step_size: of the proposal.
    :param scale: factor of the proposal's covariance, (groups, dimension, dimension) or
        (dimension, dimension); the identity by default.
    :param gradient_fn: gradient of an approximate log-posterior, for Langevin proposals.
    :param int num_bridges: number of bridges.
    :param transition_fn: a reversible step on fictitious data, for bridges.

    **Example**

    >>> import jax, jax.numpy as jnp
    >>> from numpyro_ebm.samplers.exchange import as_top_level_api
    >>> data = jnp.array([0.5, -1.0, 0.3])
    >>> exchange = as_top_level_api(  # the log of the precision of a Gaussian
    ...     lambda z: -0.5 * jnp.sum(z**2, -1),
    ...     lambda z, x: -0.5 * jnp.exp(z[:, 0]) * jnp.sum(x**2),
    ...     lambda key, z: jax.random.normal(key, (3,)) * jnp.exp(-0.5 * z[0, 0]),
    ...     data,
    ...     step_size=1.0,
    ... )
    >>> state, info = exchange.step(jax.random.key(0), exchange.init(jnp.zeros((1, 1))))
    >>> bool(info.is_divergent.any())
    False
    """
    kernel = build_kernel(num_bridges)

    def start(position, rng_key=None):
        return init(position, data, logprior_fn, logdensity_fn, gradient_fn)

    def simulate(rng_key, position):
        drawn = simulate_fn(rng_key, position)
        return drawn, drawn, None

    def one_step(rng_key, state):
        groups, dimension = state.position.shape
        factor = jnp.eye(dimension) if scale is None else jnp.asarray(scale)
        return kernel(
            rng_key,
            state,
            data,
            logprior_fn,
            logdensity_fn,
            simulate,
            jnp.broadcast_to(step_size, (groups,)),
            jnp.broadcast_to(factor, (groups, dimension, dimension)),
            gradient_fn,
            transition_fn,
        )

    return SamplingAlgorithm(start, one_step)
