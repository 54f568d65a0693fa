# SPDX-License-Identifier: Apache-2.0
"""Laws of the objectives, over every member of the family and every marginal it may stand on.

The oracles are the formulas of the objectives with closed-form scores; what is random is integrated
out by quadrature or reproduced from the problem that the objective posed.
"""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import oracles
import pytest
from numpyro.distributions import constraints
from numpyro.infer import SVI
from oracles import assert_unbiased, draws, flat, jit, z_scores
from registry.objectives import HIGH, LOW, SIGMA, SIGMA_0, Formula, expected_denoising, formulas

import numpyro_ebm as ebm
from numpyro_ebm import marginals

pytestmark = pytest.mark.usefixtures("x64")

FORMULAS = formulas("real")
DENOISING = [name for name, formula in FORMULAS.items() if formula.at is not None]
SLICED = [name for name in FORMULAS if name.startswith("SSM")]
STEIN = [name for name in FORMULAS if name.startswith("KSD")]

# Every marginal with the system on which it is exact, or its guide the posterior.
MARGINALS = {
    "Exact": (ebm.Exact, oracles.gaussian_system),
    "Enumerated": (ebm.Enumerated, oracles.grbm_system),
    "VaGES": (
        partial(ebm.VaGES, 3),
        lambda **options: oracles.with_learned_guide(oracles.grbm_system(**options)),
    ),
    "VaGES, weighted": (
        partial(ebm.VaGES, 3, importance_weighted=True),
        lambda **options: oracles.with_learned_guide(oracles.grbm_system(**options)),
    ),
    "VaGES, continuous": (
        partial(ebm.VaGES, 4),
        lambda **options: oracles.with_learned_guide(oracles.linear_system(**options)),
    ),
    "VaGES, refined": (
        partial(ebm.VaGES, 3, refine=ebm.LangevinRefinement(2, 0.1, adjusted=True)),
        lambda **options: oracles.with_learned_guide(oracles.linear_system(**options)),
    ),
}


def test_every_marginal_is_met():
    # The others are consistent only, or exact only in a limit: `test_marginals.py` has their laws.
    biased = {ebm.ImportanceBound, ebm.Unrolled}
    known = {
        x for x in vars(ebm).values() if isinstance(x, type) and issubclass(x, marginals.Marginal)
    }
    assert {type(make()) for make, _ in MARGINALS.values()} == known - biased


def value_and_gradient(fn):
    return lambda params: flat(jax.value_and_grad(fn)(params))


def arrays(params):
    return jax.tree.map(jnp.asarray, params)


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
        *((x, "Exact") for x in ["SM", "DSM", *STEIN]),
        *((x, "Enumerated") for x in ["SM", *DENOISING, *STEIN]),
    ],
)
def test_value_and_gradient_are_the_formula(name, marginal):
    make, system = MARGINALS[marginal]
    check_formula(FORMULAS[name], make(), system())


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
    make, system = MARGINALS[marginal]
    system = system(num_rows=1)
    objective = FORMULAS[name].make(make())
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
    make, system = MARGINALS[marginal]
    system = system(num_rows=num_rows + num_rows % 2 if "halves" in name else num_rows)
    objective = law.make(make())
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


@pytest.mark.parametrize("marginal", ["Exact", "Enumerated"])
def test_rows_permuted_are_the_same_score_matching_loss(marginal):
    make, system = MARGINALS[marginal]
    system = system()

    @jit
    def of(data):
        loss = partial(ebm.ScoreMatching(make()).loss, jax.random.key(0))
        return value_and_gradient(lambda p: loss(p, system.model, None, data))(
            arrays(system.params)
        )

    data = jnp.asarray(system.data)
    np.testing.assert_allclose(of(data[jnp.array([2, 0, 3, 1])]), of(data), rtol=1e-12)


def check_jit(name, marginal):
    make, system = MARGINALS[marginal]
    system = system(num_rows=2)
    objective = FORMULAS[name].make(make())

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


# The data-generating parameters


def smoothed(params, sigma):
    """The GRBM of v + σε, for a GRBM with one scale and orthogonal columns of W.

    Both are mixtures of Gaussians around b + s² W h with weights whose exponents are linear in h.
    """
    W, b, c, scale = (params[k] for k in ("W", "b", "c", "scale"))
    total = scale**2 + sigma**2
    new = scale[0] ** 2 * W / total[0]
    quadratic = 0.5 * (np.sum((scale[:, None] * W) ** 2, 0) - np.sum(total[:, None] * new**2, 0))
    return {"W": new, "b": b, "c": c + b @ W - b @ new + quadratic, "scale": np.sqrt(total)}


ORTHOGONAL = {
    "W": np.array([[1.6, -0.6], [0.8, 1.2]]),
    "b": np.array([-0.6, 0.2]),
    "c": np.array([-0.4, 0.3]),
    "scale": np.array([0.7, 0.7]),
}


def gradients_at_the_truth(law, system, truth, data, num_batches=200):
    objective = law.make()
    keys = jax.random.split(jax.random.key(8), num_batches)
    params = arrays(truth)

    @jit
    def of(keys, batches):
        def one(rng_key, data):
            loss = partial(objective.loss, rng_key)
            return flat(jax.grad(lambda p: loss(p, system.model, None, data))(params))

        return jax.vmap(one)(keys, batches)

    return np.asarray(of(keys, jnp.asarray(data).reshape(num_batches, -1, *data.shape[1:])))


@pytest.mark.parametrize(
    "name",
    ["SM", "DSM", *(pytest.param(x, marks=pytest.mark.slow) for x in ("SSM", "SSM, plain"))],
)
def test_the_truth_is_a_stationary_point(name):
    model = partial(ebm.models.grbm, num_hidden=2)
    system = oracles.grbm_system(model=model, params=ORTHOGONAL)
    data = oracles.grbm_draws(ORTHOGONAL, 60_000, np.random.default_rng(9))
    truth = smoothed(ORTHOGONAL, SIGMA) if name in DENOISING else ORTHOGONAL
    gradients = gradients_at_the_truth(FORMULAS[name], system, truth, data)
    assert_unbiased(gradients, np.zeros(gradients.shape[1]), name)
    # It is a test: somewhere else the gradient is not zero.
    moved = {**truth, "W": truth["W"] * 1.1}
    gradients = gradients_at_the_truth(FORMULAS[name], system, moved, data)
    assert np.max(np.abs(z_scores(gradients, 0.0 * gradients[0]))) > 8


def precision_model(data):
    precision = numpyro.param("precision", 1.0)
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", 0.5 * precision * v**2)


@pytest.mark.parametrize("name", DENOISING)
def test_gaussian_precision_has_its_closed_form(name):
    """For v ~ N(0, τ²): 1/(τ² + σ²), with σ⁻² its mean over the levels where there are many.

    Many levels and one σ₀: 1/σ₀² / E[1 + τ²/σ²].
    """
    tau = 0.8
    system = oracles.gaussian_system()._replace(model=precision_model)
    if "MDSM" in name:
        spread = 2 * np.log(HIGH / LOW)
        inverse_square = {
            "linear": 1 / (LOW * HIGH),
            "geometric": (LOW**-2 - HIGH**-2) / spread,
        }[name.split(", ")[-1]]
        squared = 1 / inverse_square if "own" in name else SIGMA_0**2
        precision = 1 / squared / (1 + tau**2 * inverse_square)
    else:
        precision = 1 / (tau**2 + SIGMA**2)
    data = tau * np.random.default_rng(10).normal(size=60_000)
    law = FORMULAS[name]
    gradients = gradients_at_the_truth(law, system, {"precision": precision}, data)
    assert_unbiased(gradients, np.zeros(1), name)
    away = gradients_at_the_truth(law, system, {"precision": 1.1 * precision}, data)
    assert z_scores(away, np.zeros(1))[0] > 5


# Many noise levels


@pytest.mark.parametrize("noise_scale", [1.0, None], ids=["one", "own"])
def test_the_score_that_minimises_at_many_levels(noise_scale):
    """E[∇p_σ] / (σ₀² E[p_σ/σ²]), and ∇ log E[p_σ/σ²] where each level is its own σ₀.

    The data are two modes, 80% at -1 and 20% at 1, of width 0.3. An energy with that score and two
    parameters that move it, its slope and its tilt, has no gradient in either.
    """
    low, high = 0.3, 1.0
    levels, weights = oracles.level_quadrature(low, high, "geometric", degree=8)
    fraction, width = oracles.level_quadrature(0.0, 1.0, "linear", degree=16)

    def mean_over_levels(v, power):
        variance = 0.3**2 + levels**2
        modes = [(0.8, -1.0), (0.2, 1.0)]
        logits = jnp.stack([jnp.log(w) - 0.5 * (v - m) ** 2 / variance for w, m in modes])
        return jnp.sum(weights * levels**power * jnp.exp(logits).sum(0) / jnp.sqrt(variance))

    if noise_scale is None:
        log_density = lambda v: jnp.log(mean_over_levels(v, -2))  # noqa: E731
    else:

        def log_density(v):  # the integral of the score from 0 to v
            slope = jax.vmap(jax.grad(lambda t: mean_over_levels(t, 0)))(v * fraction)
            below = noise_scale**2 * jax.vmap(lambda t: mean_over_levels(t, -2))(v * fraction)
            return v * jnp.sum(width * slope / below)

    def model(data):
        slope, tilt = numpyro.param("slope", 1.0), numpyro.param("tilt", 0.0)
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            ebm.energy("E", tilt * jnp.sin(v) - slope * jax.vmap(log_density)(v))

    law = Formula(
        lambda: ebm.MultiscaleDenoisingScoreMatching(
            noise_scale, min_noise_scale=low, max_noise_scale=high, spacing="geometric"
        ),
        None,
    )
    rng = np.random.default_rng(12)
    data = np.where(rng.uniform(size=30_000) < 0.8, -1.0, 1.0) + 0.3 * rng.normal(size=30_000)
    system = oracles.gaussian_system()._replace(model=model)
    minimum = {"slope": 1.0, "tilt": 0.0}
    assert_unbiased(gradients_at_the_truth(law, system, minimum, data), np.zeros(2), "levels")
    for moved in ({"slope": 1.3}, {"tilt": 0.3}):
        away = gradients_at_the_truth(law, system, {**minimum, **moved}, data)
        assert np.max(np.abs(z_scores(away, np.zeros(2)))) > 5


def test_one_level_is_denoising_score_matching():
    """With σ = σ₀ the loss is that of DSM over σ₀², particles and all."""
    system = oracles.with_learned_guide(oracles.grbm_system())
    data, params = jnp.asarray(system.data), arrays(system.params)
    many = ebm.MultiscaleDenoisingScoreMatching(
        SIGMA,
        ebm.VaGES(2),
        min_noise_scale=SIGMA,
        max_noise_scale=SIGMA,
        variance_reduction=False,
    )
    one = ebm.DenoisingScoreMatching(SIGMA, ebm.VaGES(2), variance_reduction=False)

    @jit
    def both(params):
        problem = posed(many, system, data, params)
        levels, noise = problem.noise
        losses = (
            lambda p: many.energy_loss(jax.random.key(1), p, problem),
            lambda p: one.energy_loss(jax.random.key(1), p, problem._replace(noise=noise)),
        )
        return levels, [value_and_gradient(loss)(params) for loss in losses]

    levels, (result, expected) = both(params)
    np.testing.assert_allclose(levels, SIGMA, rtol=1e-12)
    np.testing.assert_allclose(result, expected / SIGMA**2, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("spacing", ["linear", "geometric"])
def test_levels_are_stratified_and_not_tied_to_the_position(spacing):
    objective = ebm.MultiscaleDenoisingScoreMatching(
        0.1, min_noise_scale=0.05, max_noise_scale=1.2, spacing=spacing
    )
    num_rows, num_draws = 10, 3_000
    keys = jax.random.split(jax.random.key(0), num_draws)
    levels = np.asarray(jit(jax.vmap(lambda key: objective.levels(key, num_rows)))(keys))
    assert levels.min() >= 0.05
    assert levels.max() <= 1.2
    if spacing == "linear":
        fraction = (levels - 0.05) / (1.2 - 0.05)
    else:
        fraction = np.log(levels / 0.05) / np.log(1.2 / 0.05)
    strata = np.floor(fraction * num_rows).astype(int)
    np.testing.assert_array_equal(np.sort(strata, 1), np.tile(np.arange(num_rows), (num_draws, 1)))
    within = fraction * num_rows - strata
    assert abs(within.mean() - 0.5) < 4 * np.sqrt(1 / 12 / within.size)
    # Every position has every stratum equally often.
    table = np.stack([np.bincount(strata[:, i], minlength=num_rows) for i in range(num_rows)])
    expected = num_draws / num_rows
    chi_square = np.sum((table - expected) ** 2) / expected  # mean and variance of 81 degrees
    assert abs(chi_square - 81) < 4 * np.sqrt(2 * 81)


def test_noise_is_standard_normal_and_of_the_right_scale():
    system = oracles.gaussian_system(num_rows=3)
    objective = ebm.DenoisingScoreMatching(SIGMA)
    data, params = jnp.asarray(system.data), arrays(system.params)

    def moments(rng_key):
        problem = objective.prepare(rng_key, params, system.model, None, (data,), {})
        e = (problem.unconstrained["v"] - data).reshape(-1) / SIGMA
        return e, jnp.outer(e, e), e**3

    samples = draws(moments, jax.random.key(0), 4_000)
    expected = np.concatenate([np.zeros(6), np.eye(6).ravel(), np.zeros(6)])
    assert_unbiased(samples, expected, "noise")


# Plates


def test_subsampling_does_not_change_the_scale():
    """A plate that draws 3 of 12 rows: the loss of those rows, not N/B times it."""
    rng = np.random.default_rng(11)
    data = jnp.asarray(rng.normal(size=(12, 2)))

    def model(data):
        mean = numpyro.param("mean", jnp.zeros(2))
        precision = numpyro.param("precision", jnp.eye(2))
        with numpyro.plate("data", 12, subsample_size=3) as rows:
            v = numpyro.sample("v", ebm.Lebesgue(event_shape=(2,)), obs=data[rows])
            ebm.energy("E", 0.5 * jnp.sum(((v - mean) @ precision) * (v - mean), -1))

    params = arrays(oracles.GAUSSIAN)
    objective = ebm.ScoreMatching()
    whole = oracles.gaussian_system()._replace(data=data)

    def of(rng_key):
        loss = lambda p: objective.loss(rng_key, p, model, None, data)  # noqa: E731
        return jax.value_and_grad(loss)(params)

    expected = flat(jax.value_and_grad(oracles.score_matching(whole))(params))
    samples = draws(of, jax.random.key(0), 4_000)
    assert np.std(samples[:, 0]) > 0  # other rows every time
    assert_unbiased(samples, expected, "subsampled")


@pytest.mark.parametrize("marginal", [ebm.Enumerated(), ebm.VaGES(2)])
def test_subsampling_with_latents(marginal):
    rng = np.random.default_rng(12)
    data = jnp.asarray(rng.normal(size=(10, 2)))

    def model(data):
        W = numpyro.param("W", jnp.zeros((2, 3)))
        with numpyro.plate("data", 10, subsample_size=2) as rows:
            v = numpyro.sample("v", ebm.Lebesgue(event_shape=(2,)), obs=data[rows])
            h = numpyro.sample("h", ebm.Counting(event_shape=(3,)))
            ebm.energy("E", 0.5 * jnp.sum(v**2, -1) - jnp.sum((v @ W) * h, -1))

    def guide(data):
        A = numpyro.param("A", jnp.zeros((2, 3)))
        with numpyro.plate("data", 10, subsample_size=2) as rows:
            v = ebm.visible("v", data[rows])
            numpyro.sample("h", dist.Bernoulli(logits=v @ A).to_event(1))

    W = jnp.asarray(oracles.GRBM["W"])
    objective = ebm.DenoisingScoreMatching(SIGMA, marginal)
    system = oracles.grbm_system()._replace(data=data)

    def full(W):
        return {"W": W, "b": jnp.zeros(2), "c": jnp.zeros(3), "scale": jnp.ones(2)}

    def of(rng_key):
        loss = lambda W, A: objective.loss(rng_key, {"W": W, "A": A}, model, guide, data)  # noqa: E731
        return jax.value_and_grad(loss, (0, 1))(W, W)

    oracle = expected_denoising(system)
    value, gradient = jit(jax.value_and_grad(lambda W: oracle(full(W))))(W)
    expected = np.concatenate([[value], flat(gradient), np.zeros(6)])
    assert_unbiased(draws(of, jax.random.key(0), 6_000), expected, "subsampled, latents")


def several_sites(x, t, pixels):
    """A vector, a positive scalar and a plate of three reals, coupled."""
    w = numpyro.param("w", jnp.zeros(6))
    with numpyro.plate("data", len(x), dim=-1):
        x = numpyro.sample("x", ebm.Lebesgue(event_shape=(2,)), obs=x)
        t = numpyro.sample("t", ebm.Lebesgue(support=constraints.positive), obs=t)
        with numpyro.plate("pixels", 3, dim=-2):
            y = numpyro.sample("y", ebm.Lebesgue(), obs=pixels)
        everything = jnp.concatenate([x, jnp.log(t)[:, None], y.T], -1)
        field = jnp.tanh(everything @ w)
        ebm.energy("E", jnp.log(t) + 0.5 * jnp.sum(everything**2, -1) + field**2)


def several_log_density(p, u):
    """In unconstrained coordinates, the log-Jacobian of log t and the energy's log t cancel."""
    return -0.5 * u @ u - jnp.tanh(u @ p["w"]) ** 2


@pytest.mark.parametrize("name", ["SM", "DSM", "MDSM, linear", "KSD, IMQ"])
def test_several_visible_sites(name):
    rng = np.random.default_rng(13)
    data = rng.normal(size=(4, 6))
    arguments = data[:, :2], np.exp(data[:, 2]), data[:, 3:].T
    system = oracles.System(
        several_sites,
        None,
        {"w": rng.normal(size=6)},
        data,
        several_log_density,
        jax.grad(several_log_density, 1),
        lambda p, u: jnp.trace(jax.hessian(several_log_density, 1)(p, u)),
    )
    law = FORMULAS[name]
    objective = law.make()
    params = arrays(system.params)

    @jit
    def both(params, arguments):
        problem = objective.prepare(jax.random.key(0), params, several_sites, None, arguments, {})
        loss = lambda p: objective.energy_loss(jax.random.key(1), p, problem)  # noqa: E731
        formula = law.expected(system) if law.at is None else None
        if formula is None:
            noise = problem.noise
            levels, noise = noise if isinstance(noise, tuple) else (jnp.full(4, SIGMA), noise)
            rows = jnp.concatenate([noise["x"], noise["t"][:, None], noise["y"].T], -1)
            formula = law.at(system, levels, rows)
        return value_and_gradient(loss)(params), value_and_gradient(formula)(params)

    result, expected = both(params, jax.tree.map(jnp.asarray, arguments))
    np.testing.assert_allclose(result, expected, rtol=1e-9, atol=1e-11)


def test_slices_of_several_sites():
    """e of the shape of each site: for a quadratic energy without couplings all slices agree."""
    rng = np.random.default_rng(14)
    arguments = rng.normal(size=(4, 2)), np.exp(rng.normal(size=4)), rng.normal(size=(3, 4))
    u = np.concatenate([arguments[0], np.log(arguments[1])[:, None], arguments[2].T], -1)
    loss = jit(partial(ebm.SlicedScoreMatching(2).loss, model=several_sites, guide=None))
    params = {"w": jnp.zeros(6)}
    x, t, y = map(jnp.asarray, arguments)
    value = loss(jax.random.key(0), params, x=x, t=t, pixels=y)
    np.testing.assert_allclose(value, np.mean(0.5 * np.sum(u**2, -1)) - 6.0, rtol=1e-10)


# The marginal that is chosen, and input that is refused


def with_site(fn, site):
    def model(data):
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", fn, obs=data)
            h = numpyro.sample("h", site) if site is not None else 0.0
            ebm.energy("E", 0.5 * v**2 + v * h)

    return model


REALS = np.array([0.5, -0.3])


@pytest.mark.parametrize(
    ("latent", "marginal"),
    [
        (None, ebm.Exact),
        (ebm.Counting(), ebm.Enumerated),
        (dist.Categorical(np.array([0.2, 0.8])), ebm.Enumerated),
    ],
)
def test_the_marginal_is_chosen_by_the_latents(latent, marginal):
    model = with_site(ebm.Lebesgue(), latent)
    problem = ebm.ScoreMatching().prepare(
        jax.random.key(0), {}, model, None, (jnp.asarray(REALS),), {}
    )
    assert type(problem.marginal) is marginal


@pytest.mark.parametrize("latent", [ebm.Lebesgue(), dist.Poisson(2.0)])
def test_other_latents_want_a_choice(latent):
    model = with_site(ebm.Lebesgue(), latent)
    message = r"latent site\(s\) 'h', and no exact.*VaGES\(num_particles=2\).*guide"
    with pytest.raises(ebm.ModelError, match=message):
        ebm.DenoisingScoreMatching(0.1).loss(jax.random.key(0), {}, model, None, jnp.asarray(REALS))


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("fn", [ebm.Counting(3), dist.Bernoulli(0.5)])
def test_discrete_visibles_are_told_where_to_go(name, fn):
    message = (
        "'v' is discrete. Use PseudoLikelihood, RatioMatching, NCE, EnergyDiscrepancy or "
        "ContrastiveDivergence"
    )
    with pytest.raises(ebm.ModelError, match=message):
        FORMULAS[name].make().loss(
            jax.random.key(0), {}, with_site(fn, None), None, jnp.array([0, 1])
        )


@pytest.mark.parametrize("name", FORMULAS)
def test_latents_without_a_guide_raise(name):
    system = oracles.grbm_system()
    objective = FORMULAS[name].make(ebm.VaGES(3))
    with pytest.raises(ebm.ModelError, match=r"needs a guide q\(h \| v\).*'h'"):
        objective.loss(
            jax.random.key(0), arrays(system.params), system.model, None, jnp.asarray(system.data)
        )


@pytest.mark.parametrize("name", [name for name in FORMULAS if "SM" in name and "D" not in name])
def test_two_particles_are_too_few_for_third_derivatives(name):
    system = oracles.grbm_system()
    with pytest.raises(ebm.ModelError, match=r"order 3.*VaGES\(num_particles=3\)"):
        FORMULAS[name].make(ebm.VaGES(2)).loss(
            jax.random.key(0),
            arrays(system.params),
            system.model,
            system.guide,
            jnp.asarray(system.data),
        )


def with_prior(data):
    theta = numpyro.sample("theta", dist.Gamma(2.0))
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", 0.5 * theta * v**2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ebm.DenoisingScoreMatching(0.0), "`noise_scale` must be positive, got 0.0"),
        (lambda: ebm.DenoisingScoreMatching(-1.0), "must be positive"),
        (lambda: ebm.SlicedScoreMatching(0), "`num_slices` must be a positive integer, got 0"),
        (lambda: ebm.SlicedScoreMatching(1.5), "positive integer"),
        (lambda: ebm.ScoreMatching("exact"), "`marginal` must be a marginal.*'exact'"),
        (lambda: ebm.MultiscaleDenoisingScoreMatching(0.0), "must be positive"),
        (
            lambda: ebm.MultiscaleDenoisingScoreMatching(min_noise_scale=2.0),
            "0 < min_noise_scale <= max_noise_scale, got 2.0 and 1.2",
        ),
        (
            lambda: ebm.MultiscaleDenoisingScoreMatching(spacing="log"),
            "'linear' or 'geometric', got 'log'",
        ),
        (
            lambda: ebm.ScoreMatching().loss(
                jax.random.key(0), {}, precision_model, None, jnp.asarray(REALS)
            ),
            r"No value for the parameter\(s\) 'precision'",
        ),
        (
            lambda: ebm.ScoreMatching().loss(
                jax.random.key(0), {}, with_prior, None, jnp.asarray(REALS)
            ),
            "'theta' have a prior and no value",
        ),
        (
            lambda: ebm.ScoreMatching().loss(
                jax.random.key(0), {}, with_site(ebm.Lebesgue(), None), None, None
            ),
            None,
        ),
    ],
)
def test_bad_input(make, message):
    if message is None:
        with pytest.raises((ebm.ModelError, TypeError)):
            make()
        return
    with pytest.raises(ebm.ModelError, match=message):
        make()


# NumPyro's own SVI


def check_training(name, num_steps=80):
    law = FORMULAS[name]
    system = oracles.with_learned_guide(oracles.grbm_system(num_rows=60, seed=3))
    data = jnp.asarray(0.6 * system.data + np.array([0.5, -0.5]))
    exact = jit(law.expected(system._replace(data=data)))
    svi = SVI(system.model, system.guide, numpyro.optim.Adam(0.03), loss=law.make(ebm.VaGES(3)))

    @jit
    def run(rng_key):
        state = svi.init(rng_key, data)
        after, losses = jax.lax.scan(lambda s, _: svi.update(s, data), state, length=num_steps)
        return svi.get_params(state), svi.get_params(after), losses

    before, after, losses = run(jax.random.key(0))
    assert np.all(np.isfinite(losses))
    start, end = float(exact(before)), float(exact(after))
    print(f"{name}: exact loss {start:.3f} -> {end:.3f}")
    assert end < start - 0.05 * abs(start)
    # The guide is trained too: towards the posterior of the parameters as they move.
    assert np.max(np.abs(after["A"] - before["A"])) > 0.05


@pytest.mark.parametrize("name", ["SM", "DSM"])
def test_numpyros_svi_trains(name):
    check_training(name)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name for name in FORMULAS if name not in ("SM", "DSM", *STEIN[:2])]
)
def test_numpyros_svi_trains_with_the_other_objectives(name):
    check_training(name)


def test_numpyros_svi_runs_as_it_is():
    data = jnp.asarray(np.random.default_rng(0).normal(size=50) * 0.5)
    svi = SVI(precision_model, None, numpyro.optim.Adam(0.3), loss=ebm.ScoreMatching())
    result = svi.run(jax.random.key(0), 300, data, progress_bar=False)
    assert abs(result.params["precision"] * np.mean(data**2) - 1) < 0.01
