# SPDX-License-Identifier: Apache-2.0
"""Microcanonical Langevin Monte Carlo, with and without its Metropolis test."""

from collections.abc import Callable
from typing import Any

import blackjax
import jax
import jax.numpy as jnp
from numpyro.infer import init_to_uniform

from numpyro_ebm._compat import HMCState, IntegratorState, generate_unit_vector, trajectory_length
from numpyro_ebm.errors import ModelError, check_positive
from numpyro_ebm.mcmc.adaptation import energy_error_tuner
from numpyro_ebm.mcmc.chain_kernel import ChainKernel, StepInfo
from numpyro_ebm.types import Model

__all__ = ["MCLMC"]

ADJUSTED_LENGTH = 1.5
"""L over the root of the summed variances, where a trajectory ends with a Metropolis test: close
to π/2, a quarter of an oscillation, at which an isotropic Gaussian forgets where it came from."""

XI_OF_DIVERGENCE = 1e3
"""Squared energy error, over its target, that a diverging row counts for in the warm-up."""


class MCLMC(ChainKernel):
    r"""Microcanonical Langevin Monte Carlo on the continuous sites of an energy-based model.

    .. math:: dz = M^{-1/2} u\, dt, \qquad
        du = P(u)\bigl(-M^{-1/2} ∇U(z) / (D - 1)\, dt + η\, dW\bigr),
        \qquad P(u) = I - u u^⊤

    The velocity u has length one: a row moves at a constant speed, whatever the slope, and its
    direction turns down the energy. With ``adjusted=True`` a step is a trajectory of length about
    L from a fresh random direction, whose end is accepted or rejected row by row (MAMS): the
    stationary law is right. With ``adjusted=False`` a step is one integration step, the direction
    forgets itself over the length L (the η above), and nothing is ever rejected.

    :param model: a model with fixed parameters, ``fixed(model, params)``, whose rows have two
        coordinates at least; or any NumPyro model without an energy statement, of which it moves
        all latent sites in one chain.
    :param float step_size: ε, the length of an integration step in units of the preconditioner;
        the initial value where it is adapted.
    :param bool adjusted: whether to accept or reject.
    :param float trajectory_length: L, in the same units. By default 1.5 (adjusted) or 1
        (unadjusted) times the root of the summed variances of the coordinates, from the warm-up.
    :param bool adapt_step_size: adapt ε in warm-up: adjusted, by dual averaging of the rows' mean
        acceptance; unadjusted, to the error of the energy.
    :param float target_accept_prob: the acceptance probability to adapt to (adjusted).
    :param float target_energy_variance: the mean squared error of the energy a step and coordinate
        to adapt to (unadjusted). It sets the bias.
    :param int max_num_steps: bound on the integration steps of one trajectory (adjusted), which
        small steps would make long.
    :param bool adapt_mass_matrix: adapt a diagonal :math:`M^{-1}` in warm-up, the variances of the
        coordinates over time, averaged over rows, in Stan's windows; without, it is one.
    :param init_strategy: NumPyro initialisation strategy.
    :raises ModelError: if ``step_size``, ``trajectory_length``, ``target_energy_variance`` or
        ``max_num_steps`` is not positive, or ``step_size`` is missing where there is no warm-up;
        from ``init``, if rows have a single coordinate, or as :class:`~numpyro_ebm.MALA`.

    An integration step costs two evaluations of the model. The number of steps of a trajectory runs
    through a low-discrepancy sequence with mean L/ε, the same for all rows; it is the field
    ``num_steps`` of the state, :class:`~numpyro_ebm.mcmc.chain_kernel.LangevinState`.

    .. note:: The unadjusted kernel is biased: its stationary law is off by an error that falls like
       the cube root of ``target_energy_variance``. For a Gaussian of 30 dimensions the variances of
       its draws are 2 % too small at the default and 0.5 % at 5e-6; few dimensions, ridges and
       walls make it worse. It reports an ``accept_prob`` of one, and rows that went out of the
       range of floats as ``diverging``; these go back to where they were, with a new direction.

    Reference: Robnik, De Luca, Silverstein, Seljak, *Microcanonical Hamiltonian Monte Carlo*, 2023;
    Robnik, Cohn-Gordon, Seljak, *Metropolis adjusted microcanonical Hamiltonian Monte Carlo*, 2025.
    The kernels are BlackJAX's.

    **Example**

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import numpyro
    >>> from numpyro.infer import MCMC
    >>> import numpyro_ebm as ebm
    >>> def gaussian():
    ...     with numpyro.plate("data", 300):
    ...         v = numpyro.sample("v", ebm.Lebesgue((2,)))
    ...         ebm.energy("E", 0.5 * jnp.sum((v - 1) ** 2, -1))
    >>> kernel = ebm.MCLMC(ebm.fixed(gaussian, {}))
    >>> mcmc = MCMC(kernel, num_warmup=100, num_samples=100, progress_bar=False)
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
        adjusted: bool = True,
        trajectory_length: float | None = None,
        adapt_step_size: bool = True,
        target_accept_prob: float = 0.9,
        target_energy_variance: float = 5e-4,
        max_num_steps: int = 128,
        adapt_mass_matrix: bool = True,
        init_strategy: Callable[..., Any] = init_to_uniform,
    ):
        check_positive(
            "MCLMC", target_energy_variance=target_energy_variance, max_num_steps=max_num_steps
        )
        if trajectory_length is not None:
            check_positive("MCLMC", trajectory_length=trajectory_length)
        super().__init__(
            model,
            step_size,
            init_strategy,
            adapt_step_size=adapt_step_size,
            target_accept_prob=target_accept_prob,
            adapt_mass_matrix=adapt_mass_matrix,
        )
        self._adjusted = self.leaves_invariant = adjusted
        self._max_num_steps = max_num_steps
        self._target_energy_variance = target_energy_variance
        self._trajectory_length = trajectory_length
        if trajectory_length is None:
            self._length_factor = ADJUSTED_LENGTH if adjusted else 1.0

    def get_diagnostics_str(self, state: Any) -> str:
        steps = f" {state.num_steps} steps." if self._adjusted else ""
        return f"{super().get_diagnostics_str(state)}.{steps}".removesuffix(".")

    def _check_sites(self, row_model, dimension):
        if dimension < 2:
            raise ModelError(
                f"MCLMC: the rows of {sorted(row_model.visible)} have a single coordinate, in "
                "which a velocity of fixed length cannot turn. Use `MALA` or `UnderdampedLangevin`."
            )

    def _tuner(self):
        return super()._tuner() if self._adjusted else energy_error_tuner()

    def _initial_step_size(self, dimension=1):
        return 0.25 * dimension**0.5 if self._step_size is None else self._step_size

    def _start_row(self, rng_key, position):
        return None if self._adjusted else generate_unit_vector(rng_key, position)

    def _move(self, rng_key, chain, one_row, step_size, adapt_state, i):
        move = self._move_adjusted if self._adjusted else self._move_unadjusted
        return move(rng_key, chain, one_row, step_size, adapt_state, i)

    def _move_adjusted(self, rng_key, chain, one_row, step_size, adapt_state, i):
        # All rows take the same number of steps, so that none waits for another.
        typical = jnp.exp(jnp.mean(jnp.log(adapt_state.step_size)))
        mean: Any = jnp.maximum(adapt_state.trajectory_length / typical, 1.0)
        num_steps = jnp.clip(trajectory_length(i, mean), 1, self._max_num_steps).astype(int)
        new, info = blackjax.adjusted_mclmc.build_kernel()(
            rng_key,
            HMCState(*chain[:3]),
            one_row,
            step_size,
            (num_steps,),
            adapt_state.inverse_mass_matrix.astype(chain.logdensity.dtype),
        )
        return chain._replace(
            position=new.position, logdensity=new.logdensity, logdensity_grad=new.logdensity_grad
        ), StepInfo(
            info.acceptance_rate,
            -new.logdensity,
            info.is_divergent,
            info.acceptance_rate,
            num_steps,
        )

    def _move_unadjusted(self, rng_key, chain, one_row, step_size, adapt_state, i):
        start = IntegratorState(
            chain.position, chain.memory, chain.logdensity, chain.logdensity_grad
        )
        new, info = blackjax.mclmc.build_kernel()(
            rng_key,
            start,
            one_row,
            adapt_state.inverse_mass_matrix.astype(chain.logdensity.dtype),
            adapt_state.trajectory_length,
            step_size,
        )
        dimension = sum(jnp.size(x) for x in jax.tree.leaves(chain.position))
        xi = info.energy_change**2 / (dimension * self._target_energy_variance)
        chain = chain._replace(
            position=new.position,
            logdensity=new.logdensity,
            logdensity_grad=new.logdensity_grad,
            memory=new.momentum,
        )
        return chain, StepInfo(
            jnp.ones_like(new.logdensity),
            -new.logdensity,
            ~info.nonans,
            jnp.where(info.nonans, xi, XI_OF_DIVERGENCE),
        )
