# SPDX-License-Identifier: Apache-2.0
r"""Unadjusted Langevin algorithm (ULA), in BlackJAX's shape.

.. math:: x' = x + ε\,∇\log π(x) + \sqrt{2ε}\,ξ, \qquad ξ \sim N(0, I)

The Euler discretisation of the Langevin diffusion, BlackJAX's own integrator without a
Metropolis-Hastings test. Its stationary law differs from π by O(ε): for N(0, 1) its variance is
1/(1 - ε/2). Use it where the test is too dear or not wanted (short refinements of particles), and
MALA (``blackjax.mala``), which removes the bias, otherwise. The drift ε ∇log π may be held within
bounds, which keeps chains of a steep density from running away; the density is then another one
where the bound holds.

Reference: Roberts, Tweedie, *Exponential convergence of Langevin distributions and their discrete
approximations*, 1996, with truncated drifts; a bound on each coordinate, Du, Mordatch, *Implicit
generation and modeling with energy-based models*, NeurIPS 2019.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from numpyro_ebm._compat import SamplingAlgorithm, build_sampling_algorithm, overdamped_langevin
from numpyro_ebm.types import LogDensity

__all__ = ["ULAInfo", "ULAState", "as_top_level_api", "build_kernel", "init"]


class ULAState(NamedTuple):
    """State of one chain.

    - **position** - a pytree of arrays.
    - **logdensity** - log π at the position.
    - **logdensity_grad** - its gradient.
    """

    position: Any
    logdensity: jax.Array
    logdensity_grad: Any


class ULAInfo(NamedTuple):
    """Information on one step.

    - **is_divergent** - whether the new log-density is not finite.
    """

    is_divergent: jax.Array


def init(position: Any, logdensity_fn: LogDensity) -> ULAState:
    """State of a chain at a position."""
    return ULAState(position, *jax.value_and_grad(logdensity_fn)(position))


def build_kernel() -> Callable[..., tuple[ULAState, ULAInfo]]:
    """Build the kernel.

    It is ``(rng_key, state, logdensity_fn, step_size, max_drift=None) -> (state, info)``.
    """

    def kernel(rng_key, state, logdensity_fn, step_size, max_drift=None):
        if max_drift is not None:
            steepest = max_drift / step_size
            bounded = jax.tree.map(
                lambda g: jnp.clip(g, -steepest, steepest), state.logdensity_grad
            )
            state = state._replace(logdensity_grad=bounded)
        one_step: Any = overdamped_langevin(jax.value_and_grad(logdensity_fn))
        new_state = ULAState(*one_step(rng_key, state, step_size))
        return new_state, ULAInfo(~jnp.isfinite(new_state.logdensity))

    return kernel


def as_top_level_api(
    logdensity_fn: LogDensity, step_size: ArrayLike, max_drift: ArrayLike | None = None
) -> SamplingAlgorithm:
    """A BlackJAX ``SamplingAlgorithm`` with ``init`` and ``step``.

    :param logdensity_fn: log π of one position, up to a constant.
    :param step_size: ε, in squared units of the position.
    :param max_drift: the largest drift of a coordinate in a step, in units of the position.

    **Example**

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from numpyro_ebm.samplers.langevin import as_top_level_api
    >>> ula = as_top_level_api(lambda x: -0.5 * jnp.sum(x**2), step_size=0.1)
    >>> state, info = ula.step(jax.random.key(0), ula.init(jnp.zeros(2)))
    >>> bool(info.is_divergent)
    False
    """
    return build_sampling_algorithm(
        build_kernel(), init, logdensity_fn, kernel_args=(step_size, max_drift)
    )
