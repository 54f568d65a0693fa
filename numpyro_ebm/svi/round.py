# SPDX-License-Identifier: Apache-2.0
r"""One round of EnergySVI: steps of the guide and of other networks, then one of the energy.

A round fits the guide q(h | v; φ) for a few steps of its own loss, then takes one step on the
energy's parameters θ:

.. math:: φ \leftarrow φ - η_φ ∇_φ \mathcal G(φ; θ) \ (\text{``num\_guide\_steps'' times}), \qquad
    θ \leftarrow θ - η_θ \widehat{∇_θ \mathcal L}(θ; φ)

all at the visible values the objective uses in this round. Networks that the objective brings (a
flow, a critic) take their own steps in between, and what it keeps (persistent chains) is part of
the state. Parameters with priors add to the loss; see :mod:`~numpyro_ebm.svi.global_guide`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from numpyro_ebm.errors import ModelError
from numpyro_ebm.guides.losses import row_guide_loss
from numpyro_ebm.objectives.kept_marginals import move_marginals
from numpyro_ebm.objectives.plan import BatchRows, Plan, Problem
from numpyro_ebm.program.draws import scan_keys
from numpyro_ebm.svi.global_guide import GlobalGuide
from numpyro_ebm.svi.start import Optimizers
from numpyro_ebm.svi.state import EnergySVIState
from numpyro_ebm.types import Model, Params

__all__ = ["THETA_STREAM", "Round"]

THETA_STREAM = 0x7E7A
"""Folded into the key of a round for its draw of the parameters."""

MARGINAL_STREAM = 0x3A26
"""Folded into the key of a round for what marginals move in it."""


class Round(NamedTuple):
    """A round as a function of its key, a state and a batch; and what it is made of.

    - **plan** - model and objective, found to go together.
    - **guide, static_kwargs** - as :class:`~numpyro_ebm.EnergySVI` has them.
    - **optimizers** - the :class:`~numpyro_ebm.svi.start.Optimizers`.
    - **guide_loss, num_guide_steps** - the loss of the guide, and its steps.
    - **constrain** - from unconstrained parameters to their values, dicts by name.
    - **posterior** - the part of the guide that draws parameters, or ``None``.
    - **num_rows** - N, against which a prior is weighed once: not the rows of a minibatch. If
      ``None``, the rows of the data plate, which has to have as many as where the run started.
    - **rows** - which rows of the data the batch has, where that is known.
    """

    plan: Plan
    guide: Model | None
    static_kwargs: dict[str, Any]
    optimizers: Optimizers
    guide_loss: Any
    num_guide_steps: int
    constrain: Callable[[Params], Params]
    posterior: GlobalGuide | None
    num_rows: int | None
    rows: BatchRows | None = None

    @property
    def objective(self) -> Any:
        return self.plan.objective

    def take(
        self,
        step_key: jax.Array,
        state: EnergySVIState,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        forward_mode_differentiation: bool = False,
    ) -> tuple[EnergySVIState, jax.Array]:
        """Take the round.

        :param step_key: key of the round.
        :param EnergySVIState state: where it starts.
        :param tuple args: arguments of model and guide, the batch.
        :param dict kwargs: keyword arguments of model and guide.
        :param bool forward_mode_differentiation: differentiate the energy's loss forward.
        :return: the next state and the loss of the energy.
        """
        key_prepare, key_energy, key_guide = jax.random.split(step_key, 3)
        params, theta, problem = self.prepare(step_key, key_prepare, state, args, kwargs)
        problem, marginal_state = self._with_marginals(step_key, params, problem, state)
        guide_optim_state = state.guide_optim_state
        if guide_optim_state is not None:
            own = {**self.constrain(self.optimizers.energy.get_params(state.optim_state)), **theta}
            guide_optim_state = self._fit_guide(key_guide, own, guide_optim_state, problem)
            params.update(self.constrain(self.optimizers.guide.get_params(guide_optim_state)))
        network_optim_states = []
        for i, (network, optim, optim_state) in enumerate(self._networks(state)):
            key_network = jax.random.fold_in(key_guide, i)
            optim_state = self._train(key_network, network, params, optim, optim_state, problem)
            params.update(self.constrain(optim.get_params(optim_state)))
            network_optim_states.append(optim_state)
        key_advance = jax.random.fold_in(key_energy, 1)
        problem, objective_state = self.objective.advance(
            key_advance, lax.stop_gradient(params), problem, state.objective_state
        )

        def loss_fn(unconstrained):
            energy = {**params, **self.constrain(unconstrained)}
            return self._energy_loss(step_key, key_energy, energy, problem), None

        (loss, _), optim_state = self.optimizers.energy.eval_and_update(
            loss_fn, state.optim_state, forward_mode_differentiation=forward_mode_differentiation
        )
        if self.objective.has_state:
            after = {**params, **self.constrain(self.optimizers.energy.get_params(optim_state))}
            key_settle = jax.random.fold_in(key_energy, 2)
            objective_state = self.objective.settle(
                key_settle, params, after, problem, objective_state
            )
        state = state._replace(
            step=state.step + 1,
            optim_state=optim_state,
            guide_optim_state=guide_optim_state,
            network_optim_states=tuple(network_optim_states),
            objective_state=objective_state,
            marginal_state=marginal_state,
        )
        return state, loss

    def evaluate(
        self,
        step_key: jax.Array,
        state: EnergySVIState,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> jax.Array:
        """The loss of the energy with the random numbers of the round, before anyone's step."""
        key_prepare, key_energy, _ = jax.random.split(step_key, 3)
        params, _, problem = self.prepare(step_key, key_prepare, state, args, kwargs)
        problem, _ = self._with_marginals(step_key, params, problem, state)
        key_advance = jax.random.fold_in(key_energy, 1)
        problem, _ = self.objective.advance(key_advance, params, problem, state.objective_state)
        return self._energy_loss(step_key, key_energy, params, problem)

    def params(self, state: EnergySVIState) -> Params:
        """Values of all parameters that are trained, by name."""
        return self._named(self.unconstrained(state))

    def ema_params(self, state: EnergySVIState) -> Params | None:
        """Averages of all parameters that are trained, by name, if the state keeps any."""
        return None if state.ema is None else self._named(state.ema)

    def averaged(self, state: EnergySVIState, decay: float) -> EnergySVIState:
        """The state after a round with its averages, λ times the old ones + (1 - λ) parameters."""

        def average(old, x):
            return decay * old + (1 - decay) * x

        return state._replace(ema=jax.tree.map(average, state.ema, self.unconstrained(state)))

    def prepare(
        self,
        step_key: jax.Array,
        key_prepare: jax.Array,
        state: EnergySVIState,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[Params, Params, Problem]:
        """Place the batch.

        :return: values of all parameters, those among them that a guide drew, and the objective's
            :class:`~numpyro_ebm.objectives.base.Problem` at them.
        """
        kwargs = {**kwargs, **self.static_kwargs}
        params, theta, guide = self.params(state), {}, self.guide
        if self.posterior is not None:
            draw = self.posterior.draw(_key_of_theta(step_key), params, args, kwargs)
            guide = self.posterior.given(draw, params)
            params, theta = {**params, **draw.params}, draw.params
        problem = self.plan.problem(key_prepare, params, guide, args, kwargs)
        return params, theta, problem.at_rows(self.rows)

    def _named(self, groups):
        return self.constrain({name: x for group in groups for name, x in group.items()})

    def unconstrained(self, state: EnergySVIState) -> list[Params]:
        """Parameters in unconstrained coordinates, a dict for each optimiser."""
        groups = [self.optimizers.energy.get_params(state.optim_state)]
        if state.guide_optim_state is not None:
            groups.append(self.optimizers.guide.get_params(state.guide_optim_state))
        return groups + [optim.get_params(x) for _, optim, x in self._networks(state)]

    def _networks(self, state):
        optims, states = self.optimizers.networks, state.network_optim_states
        return list(zip(self.objective.networks, optims, states, strict=True))

    def _with_marginals(self, step_key, params, problem, state):
        key = jax.random.fold_in(step_key, MARGINAL_STREAM)
        return move_marginals(key, problem, lax.stop_gradient(params), state.marginal_state)

    def _fit_guide(self, rng_key, params, optim_state, problem):
        def step(rng_key, optim_state):
            def loss_fn(unconstrained):
                guide_params = self.constrain(unconstrained)
                return row_guide_loss(
                    self.guide_loss, rng_key, params, guide_params, problem, problem.guide.function
                ), None

            return self.optimizers.guide.eval_and_update(loss_fn, optim_state)[1]

        if self.num_guide_steps == 1:
            return step(rng_key, optim_state)  # the key itself, not the one split off it
        return scan_keys(step, optim_state, jax.random.split(rng_key, self.num_guide_steps))

    def _train(self, rng_key, network, params, optim, optim_state, problem):
        def step(rng_key, optim_state):
            def loss_fn(unconstrained):
                own = self.constrain(unconstrained)
                return network.loss(rng_key, lax.stop_gradient(params), own, problem), None

            return optim.eval_and_update(loss_fn, optim_state)[1]

        steps = jnp.arange(network.num_steps)
        keys = jax.vmap(partial(jax.random.fold_in, rng_key))(steps)
        return scan_keys(step, optim_state, keys)

    def _energy_loss(self, step_key, key_energy, params, problem):
        """The objective, and the share of a row in what the priors say."""
        row_model = problem.row_model
        if not row_model.priors:
            return self.objective.energy_loss(key_energy, params, problem)
        log_q = 0.0
        if self.posterior is not None:
            rng_key = _key_of_theta(step_key)
            draw = self.posterior.draw(rng_key, params, row_model.args, row_model.kwargs)
            # The objective knows θ alone: φ acts through the draw.
            params = {k: x for k, x in params.items() if k not in self.posterior.parameters}
            params, log_q = {**params, **draw.params}, draw.log_density
        log_ratio = log_q - row_model.log_prior(params)
        loss = self.objective.energy_loss(key_energy, params, problem)
        return loss + log_ratio / self._rows_in_all(row_model)

    def _rows_in_all(self, row_model):
        if self.num_rows is not None:
            return self.num_rows
        rows_seen = self.plan.traced.data_plate.total_rows
        if row_model.total_rows != rows_seen:
            raise ModelError(
                f"EnergySVI: the data plate '{row_model.plate}' had {rows_seen} rows and has "
                f"{row_model.total_rows} now, and the priors of {sorted(row_model.priors)} are "
                "weighed against all rows once. Say how many there are: `EnergySVI(..., "
                "num_rows=N)`."
            )
        return row_model.total_rows


def _key_of_theta(step_key):
    """The key of a round for its draw of the parameters."""
    return jax.random.fold_in(step_key, THETA_STREAM)
