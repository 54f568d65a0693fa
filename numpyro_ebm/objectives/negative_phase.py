# SPDX-License-Identifier: Apache-2.0
"""The negative phase of contrastive divergence: chains that begin, move, are kept and weighed."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from numpyro_ebm.errors import ModelError
from numpyro_ebm.model.row_model import RowModel
from numpyro_ebm.objectives.base import Objective, Problem
from numpyro_ebm.objectives.chain_balance import energy_drop, warn_if_not_there
from numpyro_ebm.objectives.chain_history import History
from numpyro_ebm.objectives.chain_moves import KernelSteps, over_chains
from numpyro_ebm.objectives.chain_options import ChainOptions
from numpyro_ebm.objectives.chain_starts import (
    draw_latent,
    draw_visible,
    spread_of_rows,
    visible_log_density,
)
from numpyro_ebm.objectives.chain_weights import check_num_chains, gradient_weights, resampled
from numpyro_ebm.objectives.persistent_chains import Chains, rows_of_batch
from numpyro_ebm.types import Params, SiteValues

__all__ = ["Negative", "NegativePhase"]


class Negative(NamedTuple):
    """The chains of a round, rows leading, and their weights if they have any."""

    position: SiteValues
    weights: jax.Array | None = None


class NegativePhase(Objective):
    """An objective whose rounds have chains of the model, in ``problem.noise``.

    ``_options`` says how many there are and where they begin, ``_steps`` how their kernel moves
    them.
    """

    _options: ChainOptions
    _steps: KernelSteps

    @property
    def has_state(self) -> bool:
        return self._options.persistent

    def check_sites(self, row_model: RowModel) -> None:
        self.check_observed(row_model)
        self._options.check_model(row_model)

    def init_state(self, rng_key: jax.Array, params: Params, problem: Problem) -> Chains:
        key_start, key_move = jax.random.split(rng_key)
        row_model, options = problem.row_model, self._options
        if row_model.covariates:
            return self._row_chains(key_start, key_move, params, problem)
        num = options.num_moving(row_model)
        total = num if options.buffer is None else options.buffer
        if options.weighted:
            check_num_chains(total)
            start, log_weights = self._weighted_start(key_start, params, problem, total)
        else:
            start, log_weights = self._start(key_start, params, problem, total), None
        position = self._on_all_sites(key_move, params, problem, start)
        size = row_model.flatten(problem.unconstrained).shape[1]
        history = History.start(options.history, total, size, num / total)
        return Chains(position, jnp.array(0), history, log_weights)

    def advance(
        self, rng_key: jax.Array, params: Params, problem: Problem, state: Any
    ) -> tuple[Problem, Any]:
        key_start, key_reset, key_move = jax.random.split(rng_key, 3)
        options = self._options
        if not options.persistent:
            start = self._start(key_start, params, problem, problem.row_model.num_rows)
            return problem._replace(
                noise=Negative(self._steps(key_move, params, problem, start))
            ), None
        index, weights = self._moving(jax.random.fold_in(key_reset, 1), problem, state), None
        chains = state.taken(index)
        if options.weighted:
            key = jax.random.fold_in(key_reset, 2)
            chains, log_weights = resampled(key, chains, state.log_weights)
            state, weights = state._replace(log_weights=log_weights), gradient_weights(log_weights)
        if options.reset_probability or state.begun is not None:
            num = len(jax.tree.leaves(chains)[0])
            restarts = jax.random.bernoulli(key_reset, options.reset_probability, (num,))
            fresh = self._start(key_start, params, problem, num)
            if options.adjusted_resets:
                key = jax.random.fold_in(key_reset, 3)
                restarts &= self._accepts(key, params, problem, fresh, chains)
            if state.begun is not None:
                restarts |= ~state.begun[index]
            # A latent site that the start says nothing about goes on from where it is.
            chains = {k: _choose_rows(restarts, fresh.get(k, x), x) for k, x in chains.items()}
        chains = self._steps(key_move, params, problem, chains)
        state = state.put(index, chains)
        if state.history is not None:
            state = state._replace(
                history=state.history.record(
                    state.num_rounds, lambda: self._look(key_start, params, problem, state)
                )
            )
        if weights is not None:
            chains = {name: x[: len(weights)] for name, x in chains.items()}
        return problem._replace(noise=Negative(chains, weights)), state

    def settle(
        self, rng_key: jax.Array, before: Params, after: Params, problem: Problem, state: Any
    ) -> Any:
        if not self._options.weighted:
            return state
        old, new = (self._densities(rng_key, p, problem, state.position) for p in (before, after))
        return state._replace(log_weights=state.log_weights + new - old)

    # At the end of a run

    def has_statistics(self, state: Any) -> bool:
        return isinstance(state, Chains) and state.begun is not None

    def statistics(
        self, rng_key: jax.Array, params: Params, problem: Problem, state: Any = None
    ) -> Any:
        """By how much energies of chains of rows fall in further sweeps, and which have begun."""
        if not self.has_statistics(state):
            return None

        def move(rng_key, rows):
            return self._steps(rng_key, params, problem, rows)

        def log_density(rows):
            return self._log_density(rng_key, params, problem, problem.row_model.from_rows(rows))

        index = rows_of_batch(problem).numbers
        key_round, key_drop = jax.random.split(rng_key)
        chains = move(key_round, state.taken(index))  # as in a round
        drop = energy_drop(key_drop, log_density, move, chains, spread_of_rows(problem))
        return drop, state.begun[index]

    def review(self, statistics: Any) -> None:
        if statistics is not None:
            warn_if_not_there(*statistics)

    # Which chains, and where they begin

    def _row_chains(self, key_start, key_move, params, problem):
        """A chain for every row of the data, each begun when its row is first in a batch."""
        num, total = problem.row_model.num_rows, rows_of_batch(problem).total
        start = self._start(key_start, params, problem, num)
        position = self._on_all_sites(key_move, params, problem, start)
        place = jnp.arange(total) % num
        position = {name: x[place] for name, x in position.items()}
        return Chains(position, jnp.array(0), begun=jnp.zeros(total, bool))

    def _on_all_sites(self, rng_key, params, problem, start):
        """Chains where they begin; moved by a round's steps, if the kernel has to place some sites.

        One that moves no others need not be compiled for it, nor be traced where there are none.
        """
        if not problem.row_model.latent:
            return start

        def move(start):
            return self._steps(rng_key, params, problem, start)

        shapes = [
            {name: (x.shape, x.dtype) for name, x in chains.items()}
            for chains in (start, jax.eval_shape(move, start))
        ]
        return start if shapes[0] == shapes[1] else move(start)

    def _moving(self, rng_key, problem, state):
        """Which chains move in this round; ``None`` for all of them."""
        row_model, options = problem.row_model, self._options
        if row_model.covariates:
            rows = rows_of_batch(problem)
            state.check(rows.total, each=False)
            return rows.numbers
        num = options.num_moving(row_model)
        if options.buffer is None:
            state.check(num, each=options.num_chains is None)
            return None
        state.check(options.buffer, each=False)
        # Neighbours from a random place on: chains do not differ, and a shuffle of all costs more
        # than a round.
        first = jax.random.randint(rng_key, (), 0, options.buffer)
        return (first + jnp.arange(num)) % options.buffer

    def _start(self, rng_key, params, problem, num):
        """Where chains begin: visible values, and h as the marginal has it of a guide."""
        row_model, guide = problem.row_model, problem.guide
        key_visible = jax.random.fold_in(rng_key, 1)
        visible = draw_visible(self._options.initial, key_visible, params, problem, num)
        if problem.marginal.has_state and num == row_model.num_rows:  # h of the rows themselves
            return {**visible, **row_model.to_rows(problem.marginal.held())}
        if guide is None or not row_model.latent:
            return visible

        def with_latents(rng_key, rows):
            u = row_model.from_rows(rows)
            draws = problem.marginal.draw_latent(rng_key, row_model, guide, params, u)
            latent = {k: row_model.latent[k].unconstrain_draw(x) for k, x in draws.items()}
            return rows | row_model.to_rows(latent)

        return over_chains(with_latents, rng_key, problem, visible)

    def _accepts(self, rng_key, params, problem, fresh, chains):
        """Which resets a test accepts: proposals that do not depend on where the chains are."""
        visible, latent = problem.row_model.visible, problem.row_model.latent
        drawn = sorted(latent.keys() & chains.keys())
        if drawn or (latent and problem.marginal.value != "exact"):
            raise ModelError(
                "ContrastiveDivergence: `adjusted_resets` are tested by log p̃(v), which wants the "
                f"latent site(s) {sorted(latent)} summed out exactly, by the marginal and by the "
                f"kernel (it draws {drawn}). Drop it."
            )

        def log_ratio(rows):
            rows = {name: rows[name] for name in visible}
            log_q = visible_log_density(self._options.initial, params, problem, rows)
            return self._densities(rng_key, params, problem, rows) - log_q

        gain = log_ratio(fresh) - log_ratio(chains)
        return jnp.log(jax.random.uniform(rng_key, jnp.shape(gain))) < gain

    def _weighted_start(self, rng_key, params, problem, num):
        """Where weighted chains begin, log p̃ - log q there."""
        keys = jax.random.split(rng_key, 3)
        initial, latent = self._options.initial, problem.row_model.latent
        start = draw_visible(initial, keys[0], params, problem, num)
        log_q = visible_log_density(initial, params, problem, start)
        moved = jax.eval_shape(lambda x: self._steps(keys[1], params, problem, x), start)
        if latent.keys() & moved.keys():

            def draw(rng_key, rows):
                return draw_latent(rng_key, params, problem, rows)

            drawn, log_r = over_chains(draw, keys[1], problem, start)
            start, log_q = {**start, **drawn}, log_q + log_r
        elif latent and problem.marginal.value != "exact":
            raise ModelError(
                f"ContrastiveDivergence: the kernel sums the latent site(s) {sorted(latent)} "
                "out, and weights are ratios of values of log p̃(v), which "
                f"{type(problem.marginal).__name__} does not have. Use an exact marginal, or "
                "`BlockGibbs`, which draws them."
            )
        return start, self._densities(keys[2], params, problem, start) - log_q

    # Densities

    def _densities(self, rng_key, params, problem, chains):
        """log p̃ of chains, (chains,): joint with the latents where the kernel draws these."""
        row_model = problem.row_model

        def log_density(rng_key, rows):
            return self._log_density(rng_key, params, problem, row_model.from_rows(rows))

        return over_chains(log_density, rng_key, problem, chains)

    def _log_density(self, rng_key, params, problem, position):
        """log p̃ of the negative phase, (rows,), with the right first derivative in θ."""
        row_model = problem.row_model
        visible = {name: position[name] for name in row_model.visible}
        latent = {name: position[name] for name in row_model.latent if name in position}
        if len(latent) < len(row_model.latent):
            if problem.marginal.has_state:
                raise ModelError(
                    f"ContrastiveDivergence: {problem.marginal!r} knows h of the data, and the "
                    "kernel of the negative phase sums "
                    f"{sorted(row_model.latent.keys() - latent.keys())} out. Let it draw them: "
                    "`BlockGibbs`, or a block of their own in `numpyro.infer.Gibbs`."
                )
            problem = problem._replace(unconstrained=visible)
            return self.estimate(rng_key, params, problem).log_density(params, visible)
        latent = {
            name: x if row_model.latent[name].is_discrete else row_model.latent[name].transform(x)
            for name, x in latent.items()
        }
        return row_model.unconstrained_log_density(params, visible, latent)

    def _free_densities(self, rng_key, params, problem, chains):
        """log p̃(v) of chains, or a bound on it that is exact if the guide is: for its value."""
        row_model, guide = problem.row_model, problem.guide

        def log_density(rng_key, rows):
            u = row_model.from_rows({name: rows[name] for name in row_model.visible})
            if problem.marginal.value is not None:
                here = problem._replace(unconstrained=u)
                return self.estimate(rng_key, params, here).log_density(params, u)
            visible, _ = row_model.constrain(u)
            latent = {name: x[0] for name, x in guide.draw(rng_key, params, visible, 1).items()}
            log_joint = row_model.unconstrained_log_density(params, u, latent)
            return log_joint - guide.log_density(params, visible, latent)

        return over_chains(log_density, rng_key, problem, chains)

    def _look(self, rng_key, params, problem, state):
        """Visible coordinates of the chains that are remembered, and their energies."""
        row_model = problem.row_model
        some = {name: x[: state.history.num_chains] for name, x in state.position.items()}
        visible = {name: some[name] for name in row_model.visible}
        if problem.marginal.has_state:  # no value of log p̃(v) without a guide: that of the joint
            energies = -self._densities(rng_key, params, problem, some)
        else:
            energies = -self._free_densities(rng_key, params, problem, visible)
        return row_model.flatten(row_model.from_rows(visible)), energies


def _choose_rows(choose, fresh, old):
    return jnp.where(jnp.reshape(choose, (-1,) + (1,) * (jnp.ndim(old) - 1)), fresh, old)
