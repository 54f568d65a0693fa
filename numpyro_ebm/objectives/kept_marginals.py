# SPDX-License-Identifier: Apache-2.0
"""What marginals keep of every row from round to round: at the start, and moved in a round."""

from typing import Any

import jax

from numpyro_ebm.errors import ModelError
from numpyro_ebm.objectives.plan import Problem
from numpyro_ebm.types import Params

__all__ = ["move_marginals", "start_marginals"]


def start_marginals(rng_key: jax.Array, problem: Problem, params: Params) -> Any:
    """What is kept at the start: of a sum a tuple, of its parts; ``None`` for nothing.

    :raises ModelError: if the objective moves the visible values, so that h has another law in
        every round.
    """
    if problem.parts:
        keys = jax.random.split(rng_key, len(problem.parts))
        kept = tuple(map(start_marginals, keys, problem.parts, [params] * len(keys)))
        return None if all(x is None for x in kept) else kept
    marginal = problem.marginal
    if marginal.has_state and problem.noise is not None:
        raise ModelError(
            f"{type(marginal).__name__} keeps draws of h given the data, and this objective adds "
            "noise to the data, another one in every round. Use `VaGES` with a guide, or "
            "ContrastiveDivergence, ScoreMatching or SlicedScoreMatching."
        )
    return marginal.init_state(rng_key, problem.row_model, params, problem.rows)


def move_marginals(
    rng_key: jax.Array, problem: Problem, params: Params, state: Any
) -> tuple[Problem, Any]:
    """The problem of a round with what its marginals hold in it, and what is kept after it."""
    if state is None:
        return problem, None
    if problem.parts:
        keys = jax.random.split(rng_key, len(problem.parts))
        pairs = zip(keys, problem.parts, state, strict=True)
        moved = [move_marginals(key, part, params, own) for key, part, own in pairs]
        parts = tuple(part for part, _ in moved)
        return problem._replace(parts=parts), tuple(own for _, own in moved)
    marginal, state = problem.marginal.advance(
        rng_key, problem.row_model, params, state, problem.rows
    )
    return problem._replace(marginal=marginal), state
