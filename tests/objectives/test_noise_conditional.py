# SPDX-License-Identifier: Apache-2.0
"""Energies that are told the noise level of each row: the loss in closed form, and refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import oracles
import pytest

import numpyro_ebm as ebm

pytestmark = pytest.mark.usefixtures("x64")

LOW, HIGH = 0.3, 1.5
X = np.random.default_rng(0).normal(size=7)
V = 0.8 * X + np.random.default_rng(1).normal(size=7)
PARAMS = {"slope": np.array(0.5), "variance": np.array(1.2)}


def regression(data, sigma=LOW):
    """Covariates in a closure."""
    slope, variance = numpyro.param("slope", 0.0), numpyro.param("variance", 1.0)
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", 0.5 * (v - slope * X) ** 2 / (variance + sigma**2))


def conditional(marginal=None, **options):
    options = {"min_noise_scale": LOW, "max_noise_scale": HIGH} | options
    return ebm.MultiscaleDenoisingScoreMatching(None, marginal, noise_argument="sigma", **options)


def expected_loss(params, spacing):
    """E ½(σ s + ε)² of N(slope x, variance + σ²), with ε integrated out by hand."""
    levels, weights = oracles.level_quadrature(LOW, HIGH, spacing)
    residual = jnp.asarray(V) - params["slope"] * X
    variance = params["variance"] + levels[:, None] ** 2
    shift, spread = levels[:, None] * residual / variance, 1 - levels[:, None] ** 2 / variance
    return weights @ jnp.mean(0.5 * (shift**2 + spread**2), -1)


def draws_of(objective, params, model, guide, num):
    def draw(key):
        loss = lambda p: objective.loss(key, p, model, guide, jnp.asarray(V))  # noqa: E731
        return jax.value_and_grad(loss)(params)

    return jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(3), num))


def assert_mean(draws, expected, limit=4.5):
    for x, y in zip(jax.tree.leaves(draws), jax.tree.leaves(expected), strict=True):
        error = np.std(x, 0, ddof=1) / np.sqrt(len(x)) + 1e-12
        assert np.all(np.abs(np.mean(x, 0) - y) < limit * error)


@pytest.mark.parametrize(
    "spacing, reduced",
    [("linear", True), pytest.param("geometric", False, marks=pytest.mark.slow)],
)
def test_loss_and_gradient_are_the_closed_form(spacing, reduced):
    objective = conditional(spacing=spacing, variance_reduction=reduced)
    found = draws_of(objective, PARAMS, regression, None, 2_000)
    assert_mean(found, jax.value_and_grad(expected_loss)(PARAMS, spacing))


def test_rows_that_are_told_their_level_count_alike_for_the_guide():
    problem = conditional().prepare(jax.random.key(2), PARAMS, mixture, None, (jnp.asarray(V),), {})
    levels, noise = problem.noise
    np.testing.assert_array_equal(levels, problem.row_model.kwargs["sigma"])
    np.testing.assert_allclose(problem.unconstrained["v"], V + levels * noise["v"])
    assert problem.row_weights is None


def mixture(data, sigma=LOW):
    """A latent sign beside covariates; the noise widens both components."""
    slope, variance = numpyro.param("slope", 0.0), numpyro.param("variance", 1.0)
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        h = numpyro.sample("h", ebm.Counting())
        mean = slope * X * (2.0 * h - 1.0)
        ebm.energy("E", 0.5 * (v - mean) ** 2 / (variance + sigma**2))


def summed(data, sigma=LOW):
    slope, variance = numpyro.param("slope", 0.0), numpyro.param("variance", 1.0)
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        terms = [0.5 * (v - s * slope * X) ** 2 / (variance + sigma**2) for s in (-1, 1)]
        ebm.energy("E", -jnp.logaddexp(-terms[0], -terms[1]))


def posterior(data, sigma=LOW):
    """p(h | v) at the level of each row, where the model's parameters are PARAMS."""
    shift = numpyro.param("shift", 0.0)
    with numpyro.plate("data", len(data)):
        v = ebm.visible("v", data)
        logits = 2 * v * PARAMS["slope"] * X / (PARAMS["variance"] + sigma**2)
        numpyro.sample("h", dist.Bernoulli(logits=logits + shift))


def test_a_guide_is_told_the_levels_of_its_rows():
    params = {**PARAMS, "shift": jnp.array(0.4)}
    args = mixture, posterior, (jnp.asarray(V),), {}
    problem = conditional(ebm.VaGES(2)).prepare(jax.random.key(2), params, *args)
    levels, point = problem.noise[0], problem.unconstrained
    site = problem.guide.trace(jax.random.key(3), params, point)["h"]
    expected = 2 * point["v"] * PARAMS["slope"] * X / (PARAMS["variance"] + levels**2) + 0.4
    np.testing.assert_allclose(site["fn"].logits, expected)


@pytest.mark.slow
def test_latents_are_summed_at_the_level_of_their_row():
    exact = draws_of(conditional(), PARAMS, summed, None, 50)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-9),
        draws_of(conditional(), PARAMS, mixture, None, 50),
        exact,
    )


@pytest.mark.slow
def test_a_guide_sees_the_level_of_its_row():
    """Unbiased with the exact posterior, which depends on σ, and not with that of one level."""
    sampled = conditional(ebm.VaGES(2))
    _, found = draws_of(sampled, {**PARAMS, "shift": jnp.array(0.0)}, mixture, posterior, 6_000)
    _, exact = draws_of(conditional(), PARAMS, summed, None, 6_000)
    assert_mean({k: found[k] - exact[k] for k in PARAMS}, dict.fromkeys(PARAMS, 0.0))


@pytest.mark.slow
def test_a_mixture_is_learned_and_drawn():
    """Modes far apart, of 0.3 and 0.7: their shares, means and widths, after 200 rows a batch."""
    key, key_sign, key_noise = jax.random.split(jax.random.key(0), 3)
    sign = jax.random.bernoulli(key_sign, 0.7, (4_000,))
    data = jnp.where(sign, 3.0, -3.0)[:, None] * jnp.ones(2)
    data = data + 0.5 * jax.random.normal(key_noise, data.shape)

    def model(data=None, sigma=0.1, num_rows=100):
        logit, mean = numpyro.param("logit", 0.0), numpyro.param("mean", 1.0)
        with numpyro.plate("data", num_rows if data is None else len(data)):
            v = numpyro.sample("v", ebm.Lebesgue((2,)), obs=data)
            width = jnp.asarray(0.25 + sigma**2)[..., None]
            left, right = (-0.5 * jnp.sum((v + s * mean) ** 2 / width, -1) for s in (1, -1))
            ebm.energy("E", -jnp.logaddexp(left, right + logit))

    objective = conditional(min_noise_scale=0.1, max_noise_scale=5.0, spacing="geometric")
    svi = ebm.EnergySVI(model, None, optax.adam(0.02), objective)
    fit = svi.run(key, 1_000, data, batch_size=200, progress_bar=False)
    shares = float(sign.mean())
    assert abs(fit.params["mean"] - 3.0) < 0.05
    assert abs(jax.nn.sigmoid(fit.params["logit"]) - shares) < 0.05

    def kernel(model):
        levels = jnp.geomspace(5.0, 0.1, 10)
        return ebm.AnnealedLangevin(model, levels, noise_argument="sigma", num_steps=40)

    v = ebm.sample(key, ebm.fixed(model, fit.params), 20, kernel=kernel)["v"].reshape(-1, 2)
    right = np.asarray(v[:, 0] > 0)
    assert abs(right.mean() - shares) < 0.08  # 2,000 draws, and the fit's own error
    np.testing.assert_allclose(v[right].mean(0), fit.params["mean"], atol=0.06)
    np.testing.assert_allclose(v[right].std(0), 0.5, atol=0.06)


# Refusals


def plain(data):
    return regression(data)


def pairs(data, energy):
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue((len(data),)), obs=jnp.outer(data, data))
        ebm.energy("E", energy(v))


def columns(data, sigma=1.0):
    pairs(data, lambda v: 0.5 * jnp.sum((v / sigma) ** 2, -1))


def projected(data, sigma=1.0):
    pairs(data, lambda v: 0.5 * jnp.sum(v**2, -1) + (v @ sigma if jnp.ndim(sigma) else 0.0))


def centred(data, sigma=1.0):
    pairs(data, lambda v: 0.5 * jnp.sum(v**2, -1) / (sigma / jnp.mean(sigma)))


def summed_up(data, sigma=1.0):
    pairs(data, lambda v: 0.5 * jnp.sum(v**2, -1) / jnp.cumsum(jnp.atleast_1d(sigma)))


def others(data, sigma=1.0):
    numbers = (jnp.arange(len(data)) + 1) % len(data)
    level = sigma[numbers] if jnp.ndim(sigma) else sigma
    pairs(data, lambda v: 0.5 * jnp.sum(v**2, -1) / level)


@pytest.mark.parametrize("model", [columns, projected, centred, summed_up, others])
def test_levels_of_other_rows_are_refused(model):
    with pytest.raises(ebm.ModelError, match=r"'E' of a row reads the 'sigma' of other rows"):
        conditional().loss(jax.random.key(0), {}, model, None, jnp.asarray(V))


def test_what_is_no_noise_conditional_model_is_refused():
    v = jnp.asarray(V)
    with pytest.raises(ebm.ModelError, match="has no argument 'sigma'"):
        conditional().loss(jax.random.key(0), PARAMS, plain, None, v)
    with pytest.raises(ebm.ModelError, match="'sigma' is the noise level of each row"):
        conditional().loss(jax.random.key(0), PARAMS, regression, None, v, sigma=0.1)
    with pytest.raises(ebm.ModelError, match="pass `noise_scale=None`"):
        ebm.MultiscaleDenoisingScoreMatching(0.1, noise_argument="sigma")
