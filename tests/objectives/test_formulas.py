# SPDX-License-Identifier: Apache-2.0
"""Laws of the objectives made of scores, on every marginal they may stand on.

The oracles are the formulas of the objectives with closed-form scores; what is random is integrated
out by quadrature or reproduced from the problem that the objective posed.
"""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from oracles import arrays, assert_unbiased, draws, flat, jit, value_and_gradient
from registry.marginals import MARGINALS as REGISTRY
from registry.objectives import SIGMA, formulas

import numpyro_ebm as ebm
from numpyro_ebm.marginals import ExactMarginal

pytestmark = pytest.mark.usefixtures("x64")

FORMULAS = formulas("real")
DENOISING = [name for name, formula in FORMULAS.items() if formula.at is not None]
SLICED = [name for name in FORMULAS if name.startswith("SSM")]
STEIN = [name for name in FORMULAS if name.startswith("KSD")]

MARGINALS = {name: x for name, x in REGISTRY.items() if x.system and x.under_objectives}
EXACT = [name for name, x in MARGINALS.items() if isinstance(x.make(), ExactMarginal)]


def on(name, **options):
    """A marginal, and the system on which it is exact or its guide is the posterior."""
    marginal, system = MARGINALS[name].make(), MARGINALS[name].system(**options)
    return marginal, oracles.with_learned_guide(system) if marginal.needs_guide else system


# Value and gradient at given noise, exactly


def posed(objective, system, data, params):
    return objective.prepare(jax.random.key(5), params, system.model, system.guide, (data,), {})


def noise_of(objective, problem):
    """Levels and noise of a problem with one visible site."""
    noise = problem.noise
    if isinstance(noise, tuple):
        levels, noise = noise
    else:
        levels = jnp.full(problem.row_model.num_rows, objective.noise_scale)
    (noise,) = noise.values()
    return levels, noise


def check_formula(law, marginal, system):
    objective = law.make(marginal)
    data, params = jnp.asarray(system.data), arrays(system.params)

    @jit
    def both(params, data):
        problem = posed(objective, system, data, params)
        loss = lambda p: objective.energy_loss(jax.random.key(6), p, problem)  # noqa: E731
        if law.at is None:
            formula = law.expected(system)
        else:
            levels, noise = noise_of(objective, problem)
            (moved,) = problem.unconstrained.values()
            shift = levels.reshape(-1, *[1] * (noise.ndim - 1)) * noise
            np.testing.assert_equal(moved.shape, noise.shape)
            formula = law.at(system, levels, noise)
            points = jnp.asarray(system.unconstrain(system.data))
            return (
                value_and_gradient(loss)(params),
                value_and_gradient(formula)(params),
                moved - points - shift,
            )
        return value_and_gradient(loss)(params), value_and_gradient(formula)(params), 0.0

    result, expected, rest = both(params, data)
    np.testing.assert_allclose(result, expected, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(rest, 0.0, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "marginal"),
    [
        *itertools.product(["SM", "DSM", *STEIN], EXACT),
        *((x, "Enumerated") for x in DENOISING if x != "DSM"),
    ],
)
def test_value_and_gradient_are_the_formula(name, marginal):
    check_formula(FORMULAS[name], *on(marginal))


@pytest.mark.parametrize(
    ("name", "support"),
    [
        ("SM", "gamma"),
        ("SM", "log_normal"),
        ("SM", "beta"),
        ("DSM", "beta"),
        ("MDSM, linear", "gamma"),
        ("KSD, IMQ", "gamma"),
        ("KSD, median", "beta"),
    ],
)
def test_other_supports_go_through_the_log_jacobian(name, support):
    check_formula(FORMULAS[name], None, getattr(oracles, support + "_system")())


@pytest.mark.parametrize("name", SLICED)
@pytest.mark.parametrize("marginal", [pytest.param("Exact", marks=pytest.mark.slow), "Enumerated"])
def test_slices_are_rademacher(name, marginal):
    """With one row of two coordinates a slice is (1, 1) or (1, -1) up to sign: all is countable."""
    marginal, system = on(marginal, num_rows=1)
    objective = FORMULAS[name].make(marginal)
    params, data = arrays(system.params), jnp.asarray(system.data)

    def one_slice(e):
        def loss(params):
            u = data[0]
            score = system.score(params, u)
            hessian = jax.jacfwd(system.score, 1)(params, u)
            plain = 0.5 * (e @ score) ** 2
            square = 0.5 * score @ score if objective.variance_reduction else plain
            return square + e @ hessian @ e

        return value_and_gradient(loss)(params)

    def of(rng_key):
        loss = partial(objective.loss, rng_key)
        return jax.value_and_grad(lambda p: loss(p, system.model, None, data))(params)

    two = np.stack(jit(lambda: [one_slice(jnp.array([1.0, s])) for s in (1.0, -1.0)])())
    n = objective.num_slices
    outcomes = np.stack([(i * two[0] + (n - i) * two[1]) / n for i in range(n + 1)])
    results = draws(of, jax.random.key(0), 64)
    nearest = np.argmin(np.abs(results[:, None, 0] - outcomes[:, 0]), 1)
    np.testing.assert_allclose(results, outcomes[nearest], rtol=1e-9, atol=1e-11)
    counts = np.bincount(nearest, minlength=n + 1)
    expected = 64 * np.array([1, 1] if n == 1 else [1, 3, 3, 1]) / 2**n
    assert np.sum((counts - expected) ** 2 / expected) < 16


# Value and gradient in the mean


def check_mean(name, marginal, num_draws, *, num_rows=3, seed=1):
    law = FORMULAS[name]
    num_rows += num_rows % 2 if "halves" in name else 0
    made, system = on(marginal, num_rows=num_rows)
    objective = law.make(made)
    params = arrays(system.params)
    expected = np.asarray(jit(value_and_gradient(law.expected(system)))(params))

    @jit
    def many(data, keys):
        def one(rng_key):
            loss = partial(objective.loss, rng_key)
            return flat(
                jax.value_and_grad(lambda p: loss(p, system.model, system.guide, data))(params)
            )

        return jax.vmap(one)(keys)

    data = jnp.asarray(system.data)
    samples = np.asarray(many(data, jax.random.split(jax.random.key(seed), num_draws)))
    assert np.all(np.isfinite(samples))
    assert_unbiased(samples, expected, f"{name}, {marginal}")
    # The rows in another order: the same law.
    other = np.asarray(
        many(law.reorder(data), jax.random.split(jax.random.key(seed + 1), num_draws))
    )
    assert_unbiased(other, expected, f"{name}, {marginal}, rows permuted")
    squares = [(x - expected) ** 2 for x in (samples, other)]
    difference = squares[0].mean(0) - squares[1].mean(0)
    error = np.sqrt((squares[0].var(0) + squares[1].var(0)) / num_draws)
    assert np.all(np.abs(difference) <= 4.5 * error + 1e-12)


FAST = [
    ("DSM", "Enumerated"),
    ("MDSM, linear", "Enumerated"),
    *((name, "VaGES") for name in ("SM", "SSM", "SSM, plain", "DSM", "DSM, plain", "MDSM, linear")),
    ("SM", "VaGES, weighted"),
    ("KSD, RBF", "VaGES"),
    ("KSD, halves", "VaGES, continuous"),
    ("DSM", "VaGES, continuous"),
    ("MDSM, linear", "VaGES, refined"),
]


@pytest.mark.parametrize(("name", "marginal"), FAST)
def test_loss_and_gradient_are_unbiased(name, marginal):
    check_mean(name, marginal, 4_000)


REST = [
    pair
    for pair in itertools.product(FORMULAS, MARGINALS)
    if pair not in FAST and ("VaGES" in pair[1] or pair[0] not in ("SM", *STEIN))
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "marginal"), REST)
def test_loss_and_gradient_are_unbiased_for_the_other_pairs(name, marginal):
    check_mean(name, marginal, 10_000, seed=3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SM", "SSM", "DSM", "MDSM, geometric"])
def test_loss_and_gradient_are_unbiased_to_three_digits(name):
    check_mean(name, "VaGES", 100_000, seed=5)


@pytest.mark.parametrize("marginal", EXACT)
def test_rows_permuted_are_the_same_score_matching_loss(marginal):
    marginal, system = on(marginal)

    @jit
    def of(data):
        loss = partial(ebm.ScoreMatching(marginal).loss, jax.random.key(0))
        return value_and_gradient(lambda p: loss(p, system.model, None, data))(
            arrays(system.params)
        )

    data = jnp.asarray(system.data)
    np.testing.assert_allclose(of(data[jnp.array([2, 0, 3, 1])]), of(data), rtol=1e-12)


def check_jit(name, marginal):
    marginal, system = on(marginal, num_rows=2)
    objective = FORMULAS[name].make(marginal)

    def of(rng_key, params, data):
        loss = partial(objective.loss, rng_key)
        return value_and_gradient(lambda p: loss(p, system.model, system.guide, data))(params)

    args = jax.random.key(3), arrays(system.params), jnp.asarray(system.data)
    np.testing.assert_allclose(jit(of)(*args), of(*args), rtol=1e-9, atol=1e-11)


def test_jit_equals_eager():
    check_jit("MDSM, linear", "Exact")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "marginal"),
    [
        *((name, "VaGES") for name in FORMULAS if name not in STEIN),
        ("KSD, median", "Enumerated"),
        *itertools.product(["SM", "DSM"], ["Enumerated", "VaGES, weighted", "VaGES, refined"]),
    ],
)
def test_jit_equals_eager_for_the_other_pairs(name, marginal):
    check_jit(name, marginal)


@pytest.mark.slow
def test_single_precision():
    system = oracles.with_learned_guide(oracles.grbm_system())
    with jax.enable_x64(False):
        data = jnp.asarray(system.data, "float32")
        params = jax.tree.map(lambda x: jnp.asarray(x, "float32"), system.params)
        loss = jit(partial(ebm.ScoreMatching().loss, model=system.model, guide=None))
        value = loss(jax.random.key(0), params, data=data)
        stochastic = jit(
            lambda p: ebm.DenoisingScoreMatching(SIGMA, ebm.VaGES(2)).loss(
                jax.random.key(0), p, system.model, system.guide, data
            )
        )(params)
        assert value.dtype == stochastic.dtype == jnp.float32
    exact = oracles.score_matching(system)(arrays(system.params))
    np.testing.assert_allclose(value, exact, rtol=1e-5)
