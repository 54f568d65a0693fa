# SPDX-License-Identifier: Apache-2.0
"""The compiled programs of a run: chunks of rounds, and what the objective does before and after.

Each is compiled once for arguments of the same shapes, and again after a call of ``clear``.
"""

from collections.abc import Callable
from typing import Any

import jax

from numpyro_ebm.objectives.kept_marginals import start_marginals
from numpyro_ebm.objectives.plan import BatchRows
from numpyro_ebm.program.compilation import compiler_options, run_compiled
from numpyro_ebm.svi.loop import take_rounds
from numpyro_ebm.svi.minibatch import Batches
from numpyro_ebm.svi.resuming import check_part
from numpyro_ebm.svi.round import Round
from numpyro_ebm.svi.saved import SavedState
from numpyro_ebm.svi.state import EnergySVIState
from numpyro_ebm.svi.streamed import StreamedBatches

__all__ = ["CompiledRounds"]

REVIEW_ROWS = 2_048
"""Rows of the data that an objective looks at when a run ends."""

STATE_STREAM, REVIEW_STREAM = 0x57A7E, 0x4E71E
"""Folded into the run's key for what happens outside the rounds."""

KEPT = {
    "objective_state": "what {!r} keeps from round to round",
    "marginal_state": "what the marginal of {!r} keeps of every row",
}
"""Parts of a state that are kept beside parameters, and whose they are."""


class CompiledRounds:
    """Programs made of rounds.

    :param make_round: ``num_rows -> Round``: a round as things stand, which weighs priors against
        so many rows.
    """

    def __init__(self, make_round: Callable[[int | None], Round]):
        self._round = make_round
        self._programs: dict[Any, Any] = {}

    def _compiled(self, function, *static):
        """A method as a program, compiled in the way that pays for this model."""
        options = compiler_options(convolutions=self._round(None).plan.traced.has_convolutions)
        key = function.__name__, *options
        if key not in self._programs:
            self._programs[key] = jax.jit(
                function, static_argnames=static, compiler_options=options
            )
        return self._programs[key]

    def clear(self) -> None:
        """Forget the compiled programs, which hold bounds of supports as constants."""
        for program in self._programs.values():
            program.clear_cache()

    def chunk(
        self, state: EnergySVIState, batches: Batches | StreamedBatches, length: int, **options: Any
    ) -> Any:
        """Up to CHUNK rounds on their minibatches; see :func:`~numpyro_ebm.svi.loop.take_rounds`.

        :param EnergySVIState state: where to start.
        :param batches: the arguments of the run.
        :param int length: number of rounds.
        :param options: ``watched``, ``stable``, ``forward_mode``, and ``ema``, the decay.
        """
        arrays, indices = batches.chunk(int(state.step), length)
        names = "minibatches", "watched", "stable", "forward_mode", "ema"
        return self._compiled(self._take_chunk, *names)(
            state, arrays, indices, length, minibatches=batches.minibatches, **options
        )

    def _take_chunk(
        self, state, arrays, indices, length, *, minibatches, watched, stable, forward_mode, ema
    ):
        a_round = self._round(minibatches.total_rows)

        def one_round(step_key, state, i):
            args, kwargs = minibatches.batch(arrays, indices, i)
            rows = minibatches.rows(indices, i)
            here = a_round._replace(rows=rows)
            state, loss = here.take(step_key, state, args, kwargs, forward_mode)
            return (state if ema is None else a_round.averaged(state, ema)), loss

        return take_rounds(one_round, state, length, watched=watched, stable=stable)

    def with_objective_state(
        self,
        state: EnergySVIState,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        rows: BatchRows | None = None,
    ) -> EnergySVIState:
        """The state with what the objective keeps from round to round, at the batch in hand."""
        a_round = self._round(None)._replace(rows=rows)

        def first(state):
            key = jax.random.fold_in(state.rng_key, STATE_STREAM)
            key_prepare, key_state = jax.random.split(key)
            params, _, problem = a_round.prepare(key, key_prepare, state, args, kwargs)
            own, objective = None, a_round.objective
            if objective.has_state:
                own = objective.init_state(key_state, params, problem)
            return own, start_marginals(jax.random.fold_in(key, 1), problem, params)

        own, kept = run_compiled(first, state, unless=(args, kwargs), options=compiler_options())
        return state._replace(objective_state=own, marginal_state=kept)

    def with_first_state(
        self, state: EnergySVIState, batches: Batches | StreamedBatches
    ) -> EnergySVIState:
        """As :meth:`with_objective_state`, at the first batch of a run, which is cut inside."""
        arrays, indices, minibatches = batches.look(batches.minibatches.batch_size)

        def first(state):
            return self._first_state(state, arrays, indices, minibatches=minibatches)

        return run_compiled(first, state, options=compiler_options())

    def with_kept(
        self, state: EnergySVIState, batches: Batches | StreamedBatches
    ) -> EnergySVIState:
        """A state to resume from, with what the objective keeps in it.

        :raises ModelError: if it is not what this objective keeps.
        """
        objective, kept = self._round(None).objective, state._replace(**dict.fromkeys(KEPT))
        if objective.keeps:  # asked of JAX's cache: traced once, and never run
            arrays, indices, minibatches = batches.look(batches.minibatches.batch_size)
            first = self._compiled(self._first_state, "minibatches")
            kept = first.eval_shape(
                kept._replace(ema=None), arrays, indices, minibatches=minibatches
            )
        for part, owner in KEPT.items():
            expected, found = getattr(kept, part), getattr(state, part)
            if isinstance(found, SavedState):
                found = found.part(part, expected)
            if _kinds(expected) != _kinds(found):  # other numbers of rows are theirs to refuse
                check_part(part, owner.format(objective), expected, found)
            state = state._replace(**{part: found})
        return state

    def _first_state(self, state, arrays, indices, *, minibatches):
        args, kwargs = minibatches.batch(arrays, indices, 0)
        return self.with_objective_state(state, args, kwargs, minibatches.rows(indices, 0))

    def review(self, state: EnergySVIState, batches: Batches | StreamedBatches) -> None:
        """Let the objective look at the result of a run, on at most REVIEW_ROWS rows."""
        num_rows = max(REVIEW_ROWS, batches.minibatches.batch_size)
        arrays, indices, minibatches = batches.look(num_rows)
        look = self._compiled(self._statistics, "minibatches")
        statistics = look(state, arrays, indices, minibatches=minibatches)
        self._round(None).objective.review(statistics)

    def _statistics(self, state, arrays, indices, *, minibatches):
        a_round = self._round(None)
        args, kwargs = minibatches.batch(arrays, indices, 0)
        a_round = a_round._replace(rows=minibatches.rows(indices, 0))
        key = jax.random.fold_in(state.rng_key, REVIEW_STREAM)
        key_prepare, key_look = jax.random.split(key)
        params, _, problem = a_round.prepare(key, key_prepare, state, args, kwargs)
        return a_round.objective.statistics(key_look, params, problem, state.objective_state)


def _kinds(tree):
    """The structure of a pytree, with the type and the number of axes of each array."""
    return jax.tree.map(lambda x: f"{x.dtype}{x.ndim}", tree)
