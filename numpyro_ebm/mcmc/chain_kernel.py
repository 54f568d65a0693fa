# SPDX-License-Identifier: Apache-2.0
r"""What the continuous kernels share: a step of a BlackJAX kernel on every row.

Every row has its own step size; rows share the preconditioner. A model without an energy is one
row. A new kernel on BlackJAX is a subclass of :class:`ChainKernel` with a ``_move`` for one row.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from numpyro.infer import init_to_uniform

from numpyro_ebm.errors import field_or_item
from numpyro_ebm.mcmc.adaptation import Adaptation, AdaptState, running_mean
from numpyro_ebm.mcmc.adaptive_kernel import AdaptiveKernel
from numpyro_ebm.samplers.per_row import per_row
from numpyro_ebm.types import Model, SiteValues

__all__ = ["Chain", "ChainKernel", "LangevinState", "StepInfo"]


class LangevinState(NamedTuple):
    """State of the continuous kernels; fields can be collected as ``extra_fields``.

    What is (rows,) here is a scalar for a model without an energy statement.

    - **i** - step counter, warm-up included.
    - **z** - dict of unconstrained values of the continuous sites.
    - **potential_energy** - minus the log-density of every row in unconstrained space, (rows,).
    - **z_grad** - gradient of the potential energy, like ``z``.
    - **energy** - the Hamiltonian of every row, (rows,), where the kernel has a momentum of its
      own; else the potential energy.
    - **accept_prob** - acceptance probability of the last step, (rows,); 1 where nothing is ever
      rejected.
    - **mean_accept_prob** - its mean over rows and steps since the last phase began.
    - **diverging** - rows whose last proposal was too bad for a float, or by the kernel's
      threshold, (rows,).
    - **num_steps** - integration steps of the last step.
    - **adapt_state** - :class:`~numpyro_ebm.mcmc.adaptation.AdaptState`.
    - **memory** - what the kernel keeps from step to step beside positions, such as momenta.
    - **rng_key** - key of the next step.
    """

    i: jax.Array
    z: SiteValues
    potential_energy: jax.Array
    z_grad: SiteValues
    energy: jax.Array
    accept_prob: jax.Array
    mean_accept_prob: jax.Array
    diverging: jax.Array
    num_steps: jax.Array
    adapt_state: AdaptState
    memory: Any
    rng_key: jax.Array

    __getitem__ = field_or_item


class Chain(NamedTuple):
    """One row: position, log-density and its gradient, and the kernel's memory of it."""

    position: SiteValues
    logdensity: jax.Array
    logdensity_grad: SiteValues
    memory: Any


class StepInfo(NamedTuple):
    """What a kernel tells of the step of one row; ``statistic`` is what tunes the step size."""

    accept_prob: jax.Array
    energy: jax.Array
    diverging: jax.Array
    statistic: jax.Array
    num_steps: jax.Array | int = 1


class ChainKernel(AdaptiveKernel):
    """One step of a BlackJAX kernel on every row, with its warm-up."""

    has_mass_matrix = False
    takes_any_model = True

    def __init__(
        self,
        model: Model,
        step_size: float | None,
        init_strategy: Callable[..., Any] = init_to_uniform,
        *,
        adapt_step_size: bool = True,
        target_accept_prob: float = 0.5,
        adapt_mass_matrix: bool = False,
    ):
        self._adapt_mass_matrix = adapt_mass_matrix
        self._trajectory_length = None
        self._length_factor = None
        super().__init__(model, step_size, init_strategy, adapt_step_size, target_accept_prob)

    def refresh(
        self, state: Any, model_args: tuple[Any, ...], model_kwargs: dict[str, Any] | None
    ) -> LangevinState:
        row_model, one_row = self._target(model_args, model_kwargs, state.z)
        chains = self._evaluate(row_model, one_row, state.z)
        kinetic = state.energy - state.potential_energy
        state = self._cache(state, chains, row_model)
        return state._replace(energy=state.potential_energy + kinetic)

    # For subclasses

    def _start_row(self, rng_key, position) -> Any:
        """The memory of a row at its start."""
        return None

    def _start_energy(self, chain):
        """The energy of a row at its start."""
        return -chain.logdensity

    def _move(self, rng_key, chain, one_row, step_size, adapt_state, i):
        """One step of one row: a new :class:`Chain` and a :class:`StepInfo`.

        ``step_size`` is that of the row; ``adapt_state`` is that of all rows.
        """
        raise NotImplementedError

    def _check_sites(self, row_model, dimension):
        pass

    # Inside

    def _target(self, model_args, model_kwargs, z):
        row_model, log_density = self._read(self._model, model_args, model_kwargs)
        return row_model, per_row(log_density, (row_model.to_rows(z),))

    @property
    def _adaptation(self):
        return Adaptation(
            self._num_warmup,
            self._tuner(),
            self._adapt_step_size,
            self._adapt_mass_matrix,
            self._length_factor,
        )

    def _init(self, rng_key, init_params, model_args, model_kwargs):
        key_init, key_rows, rng_key = jax.random.split(rng_key, 3)
        row_model = self._read_model(self._model, model_args, model_kwargs)
        z = self._initial_values(key_init, row_model, init_params)
        row_model, one_row = self._target(model_args, model_kwargs, z)
        dimension = row_model.flatten(z).shape[1]
        self._check_sites(row_model, dimension)
        chains = self._evaluate(row_model, one_row, z)
        memory = jax.vmap(self._start_row)(
            jax.random.split(key_rows, row_model.num_rows), chains.position
        )
        chains = chains._replace(memory=memory)
        state = LangevinState(
            i=jnp.array(0),
            z=z,
            potential_energy=-chains.logdensity,
            z_grad=z,
            energy=jnp.reshape(jax.vmap(self._start_energy)(chains), row_model.rows_shape),
            accept_prob=jnp.zeros(row_model.rows_shape),
            mean_accept_prob=jnp.zeros(()),
            diverging=jnp.zeros(row_model.rows_shape, bool),
            num_steps=jnp.array(0, int),
            adapt_state=self._adaptation.init(
                self._initial_step_size(dimension),
                row_model.num_rows,
                dimension,
                self.has_mass_matrix,
                self._trajectory_length,
            ),
            memory=memory,
            rng_key=rng_key,
        )
        return self._cache(state, chains, row_model)

    def _evaluate(self, row_model, one_row, z):
        rows = row_model.to_rows(z)
        return Chain(rows, *jax.vmap(jax.value_and_grad(one_row))(rows), None)

    def _cache(self, state, chains, row_model):
        gradient = row_model.from_rows(chains.logdensity_grad)
        return state._replace(
            z=row_model.from_rows(chains.position),
            potential_energy=-jnp.reshape(chains.logdensity, row_model.rows_shape),
            z_grad=jax.tree.map(jnp.negative, gradient),
        )

    def _step(self, state, model_args, model_kwargs):
        row_model, one_row = self._target(model_args, model_kwargs, state.z)
        rng_key, key_step = jax.random.split(state.rng_key)
        chains = Chain(
            row_model.to_rows(state.z),
            -jnp.atleast_1d(state.potential_energy),
            row_model.to_rows(jax.tree.map(jnp.negative, state.z_grad)),
            state.memory,
        )
        keys = (
            key_step[None]
            if row_model.num_rows == 1
            else jax.random.split(key_step, row_model.num_rows)
        )
        adapted = state.adapt_state
        chains, info = jax.vmap(
            lambda key, chain, step_size: self._move(
                key, chain, one_row, step_size, adapted, state.i
            )
        )(keys, chains, adapted.step_size)
        mean = jnp.mean(info.accept_prob)
        new = self._cache(state, chains, row_model)
        adapt_state = self._adaptation.update(
            state.i, adapted, info.statistic, lambda: row_model.flatten(new.z)
        )
        energy, accept_prob, diverging = (
            jnp.reshape(x, row_model.rows_shape)
            for x in (info.energy, info.accept_prob, info.diverging)
        )
        return new._replace(
            i=state.i + 1,
            energy=energy,
            accept_prob=accept_prob,
            mean_accept_prob=running_mean(state.mean_accept_prob, mean, state.i, self._num_warmup),
            diverging=diverging,
            num_steps=jnp.max(info.num_steps),
            adapt_state=adapt_state,
            memory=chains.memory,
            rng_key=rng_key,
        )
