# SPDX-License-Identifier: Apache-2.0
"""What objectives need of marginals, and what these keep, of problems without a model."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

import numpyro_ebm as ebm
from numpyro_ebm.objectives.kept_marginals import move_marginals, start_marginals
from numpyro_ebm.objectives.plan import Problem

MARGINALS = {"exact": ebm.Exact(), "bound": ebm.ImportanceBound(), "particles": ebm.VaGES()}
NOISE = ebm.NCE(lambda: None)


@pytest.mark.parametrize(
    "objective, served, hessians",
    [
        (ebm.MaximumLikelihood(), ["exact"], ["exact"]),
        (NOISE, ["exact", "bound"], ["exact", "bound"]),
        (ebm.ScoreMatching(), ["exact", "bound", "particles"], ["exact"]),
        (ebm.ContrastiveDivergence(ebm.BlockGibbs), ["exact", "bound", "particles"], []),
    ],
)
def test_marginals_serve_what_is_needed_of_them(objective, served, hessians):
    """Second derivatives are those of exact values, and of a bound that is the loss."""
    for name, marginal in MARGINALS.items():
        problem = SimpleNamespace(marginal=marginal)
        if name in served:
            objective.check_marginal(marginal)
            assert (objective.why_no_hessian(problem) is None) == (name in hessians)
        else:
            with pytest.raises(ebm.ModelError, match=type(objective).__name__):
                objective.check_marginal(marginal)


def test_what_keeps_a_state_says_so():
    particles = ebm.PersistentParticles(ebm.MALA)
    chains = ebm.ContrastiveDivergence(ebm.BlockGibbs, persistent=True)
    for objective, keeps, has_state in (
        (ebm.ScoreMatching(), False, False),
        (ebm.ScoreMatching(particles), True, False),
        (chains, True, True),
        (ebm.ScoreMatching() + 2.0 * ebm.ScoreMatching(particles), True, False),
        (ebm.ScoreMatching() + chains, True, True),
    ):
        assert (objective.keeps, objective.has_state) == (keeps, has_state)


class Counts:
    """A marginal that keeps how often it was moved, and with which numbers."""

    def __init__(self, has_state, seen=()):
        self.has_state, self.seen = has_state, seen

    def init_state(self, rng_key, row_model, params, rows):
        return (row_model, params, rows) if self.has_state else None

    def advance(self, rng_key, row_model, params, state, rows):
        number = float(jax.random.normal(rng_key)) if self.has_state else None
        return Counts(self.has_state, (row_model, params, number)), state and (*state, number)


def problem_of(name, has_state, noise=None, parts=()):
    return Problem(name, None, Counts(has_state), {}, noise, rows=f"rows of {name}", parts=parts)


def test_parts_of_a_sum_keep_each_its_own():
    key = jax.random.key(3)
    parts = tuple(problem_of(name, has) for name, has in (("a", True), ("b", False), ("c", True)))
    whole = problem_of("sum", False, parts=parts)
    kept = start_marginals(key, whole, "start")
    assert kept == (("a", "start", "rows of a"), None, ("c", "start", "rows of c"))
    assert start_marginals(key, parts[0], "start") == kept[0]
    assert start_marginals(key, whole._replace(parts=parts[1:2]), "start") is None
    moved, after = move_marginals(key, whole, "later", kept)
    assert [x.marginal.seen[:2] for x in (moved.parts[0], moved.parts[2])] == [
        ("a", "later"),
        ("c", "later"),
    ]
    assert moved.parts[1] is parts[1] and after[1] is None
    assert [x[:3] for x in (after[0], after[2])] == [kept[0], kept[2]]
    assert np.all(after[0][3] != after[2][3])  # keys of their own
    assert move_marginals(key, whole, "later", None) == (whole, None)
    with pytest.raises(ebm.ModelError, match="adds noise to the data"):
        start_marginals(key, problem_of("a", True, noise=1.0), "start")
