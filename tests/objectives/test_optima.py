# SPDX-License-Identifier: Apache-2.0
"""Where objectives of scores are least: closed forms, many noise levels, and training."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import oracles
import pytest
from numpyro.infer import SVI
from oracles import arrays, assert_unbiased, draws, flat, jit, value_and_gradient, z_scores
from registry.objectives import HIGH, LOW, SIGMA, SIGMA_0, Formula, formulas

import numpyro_ebm as ebm

pytestmark = pytest.mark.usefixtures("x64")

FORMULAS = formulas("real")
DENOISING = [name for name, formula in FORMULAS.items() if formula.at is not None]
STEIN = [name for name in FORMULAS if name.startswith("KSD")]


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


@pytest.mark.parametrize("name", DENOISING)
def test_gaussian_precision_has_its_closed_form(name):
    """For v ~ N(0, τ²): 1/(τ² + σ²), with σ⁻² its mean over the levels where there are many.

    Many levels and one σ₀: 1/σ₀² / E[1 + τ²/σ²].
    """
    tau = 0.8
    system = oracles.gaussian_system()._replace(model=oracles.precision)
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


@pytest.mark.slow
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
        problem = many.prepare(jax.random.key(5), params, system.model, system.guide, (data,), {})
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
    svi = SVI(oracles.precision, None, numpyro.optim.Adam(0.3), loss=ebm.ScoreMatching())
    result = svi.run(jax.random.key(0), 300, data, progress_bar=False)
    assert abs(result.params["precision"] * np.mean(data**2) - 1) < 0.01
