# SPDX-License-Identifier: Apache-2.0
"""Underdamped Langevin dynamics with a Metropolis test: generalised Hamiltonian Monte Carlo."""

from collections.abc import Callable
from typing import Any

import blackjax
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from numpyro.infer import init_to_uniform

from numpyro_ebm._compat import GHMCState, generate_gaussian_noise
from numpyro_ebm.errors import check_positive
from numpyro_ebm.mcmc.chain_kernel import ChainKernel, StepInfo
from numpyro_ebm.types import Model

__all__ = ["UnderdampedLangevin"]

LEAST_ACCEPTANCE = 1e-9
"""An acceptance probability below what a uniform number in single precision can tell from 0."""


class UnderdampedLangevin(ChainKernel):
    r"""Underdamped Langevin dynamics on the continuous sites of an energy-based model (GHMC).

    .. math:: dz = M^{-1} m\, dt, \qquad
        dm = -∇U(z)\, dt - γ m\, dt + \sqrt{2γ}\, M^{1/2} dW

    A step refreshes a part :math:`1 - e^{-2γε}` of the momentum's variance, takes one leapfrog step
    of size ε, and accepts or rejects it row by row; a rejected row turns back. The momentum lives
    on, so that a row runs on in its direction for a time of about 1/γ and covers ground that a
    random walk such as MALA's covers in the square of the steps. Acceptance compares with a uniform
    number that itself moves slowly, which bunches rejections and leaves long runs between them.
    In the first steps of a warm-up both are drawn afresh: a row that comes down a steep slope would
    keep in them what it falls, and climb again.

    :param model: a model with fixed parameters, ``fixed(model, params)``; or any NumPyro model
        without an energy statement, of which it moves all latent sites in one chain.
    :param float step_size: ε, in units of time: a free coordinate moves by about ε of its scale in
        the preconditioner. The initial value where it is adapted.
    :param float friction: γ, the inverse of the time over which a momentum is forgotten, in the
        same units. Lower it where coordinates are strongly correlated: 1/γ should be about the
        largest scale of the model after preconditioning.
    :param bool adapt_step_size: adapt ε in warm-up by dual averaging of the acceptance of each row.
    :param float target_accept_prob: the acceptance probability to adapt to. It is high because a
        rejection turns the row back.
    :param bool adapt_mass_matrix: adapt a diagonal :math:`M^{-1}` in warm-up, the variances of the
        coordinates over time, averaged over rows, in Stan's windows; without, it is one.
    :param init_strategy: NumPyro initialisation strategy.
    :raises ModelError: if ``step_size`` or ``friction`` is not positive, or ``step_size`` is
        missing where there is no warm-up; from ``init``, as :class:`~numpyro_ebm.MALA`.

    One evaluation of the model a step, as for MALA. The field ``energy`` of its state,
    :class:`~numpyro_ebm.mcmc.chain_kernel.LangevinState`, is the Hamiltonian
    :math:`U(z) + \tfrac12 m^⊤ M^{-1} m`; ``memory`` holds :math:`M^{-1/2} m` and the slice.

    Reference: Horowitz, *A generalized guided Monte Carlo algorithm*, 1991; Neal, *Non-reversibly
    updating a uniform [0, 1] value for Metropolis accept/reject decisions*, 2020; the settings,
    Hoffman, Sountsov, *Tuning-free generalized Hamiltonian Monte Carlo*, 2022. The kernel is
    BlackJAX's.

    **Example**

    >>> import jax
    >>> import numpyro
    >>> from numpyro.infer import MCMC
    >>> import numpyro_ebm as ebm
    >>> def gaussian():
    ...     with numpyro.plate("data", 500):
    ...         v = numpyro.sample("v", ebm.Lebesgue())
    ...         ebm.energy("E", 0.5 * (v - 1) ** 2)
    >>> kernel = ebm.UnderdampedLangevin(ebm.fixed(gaussian, {}))
    >>> mcmc = MCMC(kernel, num_warmup=200, num_samples=100, progress_bar=False)
    >>> mcmc.run(jax.random.key(0))
    >>> bool(abs(mcmc.get_samples()["v"].mean() - 1) < 0.1)
    True
    """

    has_mass_matrix = True

    def __init__(
        self,
        model: Model,
        step_size: float | None = None,
        *,
        friction: float = 1.0,
        adapt_step_size: bool = True,
        target_accept_prob: float = 0.8,
        adapt_mass_matrix: bool = True,
        init_strategy: Callable[..., Any] = init_to_uniform,
    ):
        check_positive("UnderdampedLangevin", friction=friction)
        self._friction = friction
        super().__init__(
            model,
            step_size,
            init_strategy,
            adapt_step_size=adapt_step_size,
            target_accept_prob=target_accept_prob,
            adapt_mass_matrix=adapt_mass_matrix,
        )

    def _start_row(self, rng_key, position):
        key_momentum, key_slice = jax.random.split(rng_key)
        momentum = generate_gaussian_noise(key_momentum, position)
        dtype = jnp.result_type(*jax.tree.leaves(position))
        return momentum, jax.random.uniform(key_slice, (), dtype, minval=-1.0)

    def _start_energy(self, chain):
        return -chain.logdensity + _half_square(chain.memory[0])

    def _move(self, rng_key, chain, one_row, step_size, adapt_state, i):
        # Momenta are kept in units of the preconditioner, so that they stay right when it changes.
        settles = i < self._adaptation.num_settling
        whitened, slice_ = jax.lax.cond(
            settles,
            lambda: self._start_row(jax.random.fold_in(rng_key, 1), chain.position),
            lambda: chain.memory,
        )
        flat, unravel = ravel_pytree(whitened)
        scale = jnp.sqrt(adapt_state.inverse_mass_matrix).astype(flat.dtype)
        alpha = 1 - jnp.exp(-2 * self._friction * step_size)
        delta = alpha / 2
        state = GHMCState(
            chain.position, unravel(flat / scale), chain.logdensity, chain.logdensity_grad, slice_
        )
        kernel = blackjax.ghmc.build_kernel()
        new, info = kernel(rng_key, state, one_row, step_size, scale, alpha, delta)
        # A slice of exactly 0, one in 2²⁴, accepts whatever is proposed, and turns NaN.
        impossible = info.is_accepted & (info.acceptance_rate < LEAST_ACCEPTANCE)
        new = jax.tree.map(lambda x, old: jnp.where(impossible, old, x), new, state)
        momentum = unravel(ravel_pytree(new.momentum)[0] * scale)
        chain = chain._replace(
            position=new.position,
            logdensity=new.logdensity,
            logdensity_grad=new.logdensity_grad,
            memory=(momentum, new.slice.astype(slice_.dtype)),
        )
        return chain, StepInfo(
            info.acceptance_rate,
            -new.logdensity + _half_square(momentum),
            info.is_divergent,
            info.acceptance_rate,
        )


def _half_square(momentum):
    return 0.5 * sum(jnp.sum(m * m) for m in jax.tree.leaves(momentum))
