# SPDX-License-Identifier: Apache-2.0
"""Overdamped Langevin kernels: MALA, and ULA, which is MALA without its correction."""

from collections.abc import Callable
from typing import Any

import blackjax
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from numpyro.infer import init_to_uniform

from numpyro_ebm._compat import MALAState
from numpyro_ebm.errors import ModelError, check_positive
from numpyro_ebm.mcmc.chain_kernel import ChainKernel, StepInfo
from numpyro_ebm.samplers import langevin
from numpyro_ebm.types import Model

__all__ = ["MALA", "ULA"]


class MALA(ChainKernel):
    r"""Metropolis-adjusted Langevin algorithm on the continuous sites of an energy-based model.

    .. math:: z' = z - ε ∇U(z) + \sqrt{2ε}\, ξ

    accepted or rejected row by row, so that every row is a chain with the right stationary law.

    :param model: a model with fixed parameters, ``fixed(model, params)``; or any NumPyro model
        without an energy statement, of which it moves all latent sites in one chain.
    :param float step_size: ε, in squared units of the unconstrained sites; the initial value where
        it is adapted.
    :param bool adapt_step_size: adapt ε in warm-up by dual averaging of the acceptance of each row.
    :param float target_accept_prob: the acceptance probability to adapt to. 0.574 is optimal in
        many dimensions; in few, and where the energy grows faster than a square or a transform of
        the support is steep, its long steps leave the tails unvisited for hundreds of steps.
    :param bool adapt_mass_matrix: adapt a diagonal preconditioner M⁻¹ in warm-up: the step is that
        of the coordinates :math:`M^{1/2} z`, and ε counts in their units. It pays where the scales
        of coordinates differ by more than a factor of about three.
    :param init_strategy: NumPyro initialisation strategy.
    :raises ModelError: if ``step_size`` is not positive, or is missing where there is no warm-up;
        from ``init``, if the model has free parameters, no continuous site to move, discrete sites
        that cannot be summed out, or an energy that is not finite at the initial values.

    Runs under NumPyro's ``MCMC``, with all its chain methods, and as a block of ``Gibbs`` beside
    ``DiscreteGibbs``. Its state is :class:`~numpyro_ebm.mcmc.chain_kernel.LangevinState`.

    Reference: Roberts, Tweedie 1996; Roberts, Rosenthal, *Optimal scaling of discrete
    approximations to Langevin diffusions*, 1998. The kernel is BlackJAX's.

    **Example**

    >>> import jax
    >>> import numpyro
    >>> from numpyro.infer import MCMC
    >>> import numpyro_ebm as ebm
    >>> def gaussian():
    ...     with numpyro.plate("data", 500):
    ...         v = numpyro.sample("v", ebm.Lebesgue())
    ...         ebm.energy("E", 0.5 * (v - 1) ** 2)
    >>> mcmc = MCMC(
    ...     ebm.MALA(ebm.fixed(gaussian, {})), num_warmup=200, num_samples=100, progress_bar=False
    ... )
    >>> mcmc.run(jax.random.key(0))
    >>> bool(abs(mcmc.get_samples()["v"].mean() - 1) < 0.1)
    True

    On an ordinary NumPyro model, whose posterior is N(0.8, 0.2):

    >>> import numpyro.distributions as dist
    >>> def normal(y):
    ...     mean = numpyro.sample("mean", dist.Normal(0.0, 1.0))
    ...     numpyro.sample("y", dist.Normal(mean, 0.5), obs=y)
    >>> mcmc = MCMC(ebm.MALA(normal), num_warmup=200, num_samples=2_000, progress_bar=False)
    >>> mcmc.run(jax.random.key(1), 1.0)
    >>> bool(abs(mcmc.get_samples()["mean"].mean() - 0.8) < 0.1)
    True
    """

    is_reversible = True

    def __init__(
        self,
        model: Model,
        step_size: float | None = None,
        *,
        adapt_step_size: bool = True,
        target_accept_prob: float = 0.75,
        adapt_mass_matrix: bool = False,
        init_strategy: Callable[..., Any] = init_to_uniform,
    ):
        self.has_mass_matrix = adapt_mass_matrix
        super().__init__(
            model,
            step_size,
            init_strategy,
            adapt_step_size=adapt_step_size,
            target_accept_prob=target_accept_prob,
            adapt_mass_matrix=adapt_mass_matrix,
        )

    def _move(self, rng_key, chain, one_row, step_size, adapt_state, i):
        scale = None
        if adapt_state.inverse_mass_matrix is not None:
            flat, unravel = ravel_pytree(chain.position)
            scale = unravel(jnp.sqrt(adapt_state.inverse_mass_matrix).astype(flat.dtype))
        start = _whiten(MALAState(*chain[:3]), scale)
        log_density = one_row if scale is None else lambda y: one_row(_times(y, scale))
        new, info = blackjax.mala.build_kernel()(rng_key, start, log_density, step_size)
        accept_prob = info.acceptance_rate
        position, gradient = new.position, new.logdensity_grad
        if scale is not None:  # a rejected row keeps its position exactly
            old = chain.position
            moved = _times(position, scale)
            position = jax.tree.map(lambda a, b: jnp.where(info.is_accepted, a, b), moved, old)
            gradient = jax.tree.map(jnp.divide, gradient, scale)
        chain = chain._replace(
            position=position, logdensity=new.logdensity, logdensity_grad=gradient
        )
        return chain, StepInfo(accept_prob, -new.logdensity, accept_prob == 0.0, accept_prob)


class ULA(ChainKernel):
    r"""Unadjusted Langevin algorithm on the continuous sites of an energy-based model.

    .. math:: z' = z - ε ∇U(z) + \sqrt{2ε}\, ξ

    Every step is taken, so that its stationary law is off by O(ε): for a Gaussian of variance 1 the
    variance of the draws is 1/(1 - ε/2). It is stochastic gradient Langevin dynamics with the full
    gradient. Steps α on an energy with noise σ that is not √(2α), as of short-run chains of
    networks, sample it at the temperature T = σ²/(2α): they are those of the tempered model,
    ``ULA(temper(model, 1 / T), step_size=σ**2 / 2)``. In ``ContrastiveDivergence`` the temperature
    is an option, which a fit remembers.

    :param model: a model with fixed parameters, ``fixed(model, params)``; or any NumPyro model
        without an energy statement, of which it moves all latent sites in one chain.
    :param float step_size: ε, in squared units of the unconstrained sites. There is no acceptance
        probability to adapt it to.
    :param float max_drift: a bound on each coordinate of the drift ε ∇U in a step, in units of the
        unconstrained sites: gradients clipped at c are ``max_drift=ε * c``. It keeps chains of a
        steep energy from running away. Where it holds the energy is a cone, and the law of the
        draws another one than the model's.
    :param init_strategy: NumPyro initialisation strategy.
    :raises ModelError: as :class:`MALA`; if ``max_drift`` is not positive.

    Reference: Roberts, Tweedie 1996; clipped gradients, Du, Mordatch, *Implicit generation and
    modeling with energy-based models*, NeurIPS 2019; short-run chains, Nijkamp, Hill, Zhu, Wu,
    *Learning non-convergent non-persistent short-run MCMC toward energy-based model*, NeurIPS 2019.
    The integrator is BlackJAX's.

    **Example**

    >>> import jax.numpy as jnp
    >>> import numpyro_ebm as ebm
    >>> model = ebm.fixed(
    ...     ebm.models.grbm,
    ...     {"W": jnp.ones((2, 4)), "b": jnp.zeros(2), "c": jnp.zeros(4), "scale": jnp.ones(2)},
    ... )
    >>> kernel = ebm.ULA(model, step_size=0.01)
    """

    leaves_invariant = False

    def __init__(
        self,
        model: Model,
        step_size: float,
        *,
        max_drift: float | None = None,
        init_strategy: Callable[..., Any] = init_to_uniform,
    ):
        if step_size is None:
            raise ModelError("ULA: pass a `step_size`; there is nothing to adapt it to.")
        if max_drift is not None:
            check_positive("ULA", max_drift=max_drift)
        self._max_drift = max_drift
        super().__init__(model, step_size, init_strategy, adapt_step_size=False)

    def _move(self, rng_key, chain, one_row, step_size, adapt_state, i):
        start = langevin.ULAState(*chain[:3])
        new, info = langevin.build_kernel()(rng_key, start, one_row, step_size, self._max_drift)
        one = jnp.ones_like(new.logdensity)
        return chain._replace(
            position=new.position, logdensity=new.logdensity, logdensity_grad=new.logdensity_grad
        ), StepInfo(one, -new.logdensity, info.is_divergent, one)


def _times(position, scale):
    return jax.tree.map(jnp.multiply, position, scale)


def _whiten(state, scale):
    if scale is None:
        return state
    return state._replace(
        position=jax.tree.map(jnp.divide, state.position, scale),
        logdensity_grad=_times(state.logdensity_grad, scale),
    )
