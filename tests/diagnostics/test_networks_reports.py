# SPDX-License-Identifier: Apache-2.0
"""Reports of networks: classification, rows of another source, denoising, bounds of log Z."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from scipy import stats

import numpyro_ebm as ebm
from numpyro_ebm.diagnostics import (
    auroc,
    classification,
    denoising_loss,
    log_likelihood_bounds,
)
from numpyro_ebm.diagnostics.likelihood_bounds import _langevin_move

KEY = jax.random.key(9)
RNG = np.random.default_rng(9)


def test_areas_count_pairs():
    x, y = RNG.integers(0, 6, 40) + 1.0, RNG.integers(0, 6, 30)
    pairs = (x[:, None] > y) + 0.5 * (x[:, None] == y)
    found = auroc(x, y)
    np.testing.assert_allclose(found.value, pairs.mean(), rtol=1e-6)
    variance = pairs.mean(1).var(ddof=1) / 40 + pairs.mean(0).var(ddof=1) / 30
    np.testing.assert_allclose(found.standard_error, np.sqrt(variance), rtol=1e-5)
    np.testing.assert_allclose(auroc(y, x).value, 1 - pairs.mean(), rtol=1e-5)
    with pytest.raises(ebm.ModelError, match="two scores"):
        auroc(x[:1], y)


def test_the_area_of_two_gaussians_and_its_error():
    """P(N(1, 1) > N(0, 1)) = Φ(1/√2), and the errors are as wide as the areas scatter."""

    def one(key):
        keys = jax.random.split(key)
        return auroc(1 + jax.random.normal(keys[0], (40,)), jax.random.normal(keys[1], (80,)))

    found = jax.jit(jax.vmap(one))(jax.random.split(KEY, 500))
    scatter = np.std(found.value)
    assert abs(found.value.mean() - stats.norm.cdf(0.5**0.5)) < 4 * scatter / np.sqrt(500)
    assert 0.9 < found.standard_error.mean() / scatter < 1.1


def test_accuracy_log_loss_and_calibration_by_hand():
    p = np.array([[0.9, 0.1], [0.95, 0.05], [0.3, 0.7], [0.55, 0.45]])
    labels = np.array([0, 1, 1, 1])
    found = classification(KEY, np.log(p) + 3.0, labels, num_bins=10)
    assert found.accuracy == 0.5
    np.testing.assert_allclose(found.accuracy_error, np.std([1, 0, 1, 0], ddof=1) / 2, rtol=1e-6)
    losses = -np.log(p[np.arange(4), labels])
    np.testing.assert_allclose(found.log_loss, losses.mean(), rtol=1e-5)
    np.testing.assert_allclose(found.log_loss_error, losses.std(ddof=1) / 2, rtol=1e-5)
    # Bins (0.8, 0.9], (0.9, 1], (0.6, 0.7] and (0.5, 0.6], one row each.
    ece = (0.1 + 0.95 + 0.3 + 0.55) / 4
    np.testing.assert_allclose(found.calibration, ece, rtol=1e-4)
    found = classification(KEY, np.log(p), labels, num_bins=1)
    np.testing.assert_allclose(found.calibration, abs(2 - 3.1) / 4, rtol=1e-4)


def test_the_figures_of_a_calibration_are_those_of_binomials():
    """Twenty right rows of confidence 0.95, and twenty wrong ones of 0.6."""
    confidence, right = np.repeat([0.95, 0.6], 20), np.repeat([1, 0], 20)
    logits = np.log(np.stack([confidence, 1 - confidence], -1))
    found = classification(KEY, logits, 1 - right, num_bootstrap=2_000)
    np.testing.assert_allclose(found.calibration, (0.05 + 0.6) / 2, rtol=1e-5)
    # A resample has a binomial number of the right rows.
    exact = (0.6 - 0.05) / (2 * np.sqrt(40))
    np.testing.assert_allclose(found.calibration_error, exact, rtol=4 / np.sqrt(4_000))
    null = sum(stats.binom(20, p).expect(lambda k, p=p: abs(k - 20 * p)) for p in (0.95, 0.6)) / 40
    np.testing.assert_allclose(found.calibration_baseline, null, rtol=0.05)
    np.testing.assert_allclose(found.calibration_p_value, 1 / 2_001, rtol=1e-5)
    # All of confidence 0.6 and 23 of 40 right, in any order: hardly any labels are nearer.
    alike = np.repeat(logits[20:], 2, 0)
    labels = np.random.default_rng(1).permutation(np.repeat([0, 1], [23, 17]))
    found = classification(KEY, alike, labels, num_bootstrap=2_000)
    exact = 1 - stats.binom(40, 0.6).pmf(24)
    assert abs(found.calibration_p_value - exact) < 4 * np.sqrt(exact * (1 - exact) / 2_000)


@pytest.mark.slow
def test_calibrated_classes_have_uniform_p_values():
    def one(key, sharpen):
        key_p, key_y, key = jax.random.split(key, 3)
        logits = 2 * jax.random.normal(key_p, (150, 3))
        labels = jax.random.categorical(key_y, logits)
        return classification(key, sharpen * logits, labels, num_bootstrap=99)

    keys = jax.random.split(KEY, 300)
    right = jax.jit(jax.vmap(lambda key: one(key, 1.0)))(keys)
    assert stats.kstest(np.asarray(right.calibration_p_value), "uniform").pvalue > 1e-3
    error = right.calibration.std() / np.sqrt(300)
    assert abs(right.calibration.mean() - right.calibration_baseline.mean()) < 4 * error
    sure = jax.jit(jax.vmap(lambda key: one(key, 3.0)))(keys[:50])
    assert np.mean(sure.calibration_p_value <= 0.05) > 0.9
    assert 0.7 < sure.calibration_error.mean() / sure.calibration.std() < 1.4


def test_labels_that_are_no_classes_are_refused():
    logits = RNG.normal(size=(5, 3))
    for labels, words in (
        ([0, 1, 2, 3, 1], "row 3 is 3, and there are 3 classes"),
        ([0, -1, 2, 0, 1], "row 1 is -1"),
        ([0, 1], r"\(2,\)"),
        ([0.0, 1.0, 2.0, 0.0, 1.0], "integers"),
    ):
        with pytest.raises(ebm.ModelError, match=words):
            classification(KEY, logits, np.array(labels))


def gaussian(data, precision=1.0, size=3):
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(event_shape=(size,)), obs=data)
        ebm.energy("E", 0.5 * precision * jnp.sum(v**2, -1))


def test_the_denoising_loss_of_a_gaussian_is_the_closed_form():
    """½ E|(1 - pσ²) ε - pσ v|² = ½ D ((1 - pσ²)² + p²σ²τ²) for data of deviation τ."""
    data = 0.7 * RNG.normal(size=(400, 3))
    scales = np.array([0.2, 1.0, 2.0])
    model = ebm.fixed(gaussian, {})
    found = denoising_loss(KEY, model, data, 1.6, noise_scale=scales)
    exact = 1.5 * ((1 - 1.6 * scales**2) ** 2 + 1.6**2 * scales**2 * 0.49)
    assert np.all(np.abs(found.value - exact) < 4 * found.standard_error)
    assert np.all(found.standard_error < 0.08 * exact) and found.by_row.shape == (3, 400)
    flat = denoising_loss(KEY, model, data, 1e-8, noise_scale=0.5, num_draws=3)  # no score: D / 2
    assert abs(flat.value - 1.5) < 4 * flat.standard_error and flat.value.shape == ()
    for x in (found, flat):  # rows are independent, draws of one row are not
        error = np.std(x.by_row, -1, ddof=1) / np.sqrt(400)
        np.testing.assert_allclose(x.standard_error, error, rtol=1e-4)


def test_the_denoising_loss_sums_latents_and_keeps_labels():
    def mixture(x, y=None):
        mean = jnp.array([-2.0, 2.0])
        with numpyro.plate("data", len(x)):
            x = numpyro.sample("x", ebm.Lebesgue(), obs=x)
            y = numpyro.sample("y", ebm.Counting(2), obs=y)
            ebm.energy("E", 0.5 * (x - mean[y]) ** 2)

    y = RNG.integers(0, 2, 300)
    x = 4.0 * y - 2 + RNG.normal(size=300)
    model = ebm.fixed(mixture, {})
    summed = denoising_loss(KEY, model, x, noise_scale=0.5)
    known = denoising_loss(KEY, model, x, y, noise_scale=0.5)
    exact = 0.5 * ((1 - 0.25) ** 2 + 0.25)  # of a unit Gaussian
    assert abs(known.value - exact) < 4 * known.standard_error
    assert 0 < abs(summed.value - known.value) < 0.05
    with pytest.raises(ebm.ModelError, match="discrete"):
        denoising_loss(KEY, ebm.fixed(labels_only, {}), y, noise_scale=0.5)
    with pytest.raises(ebm.ModelError, match="noise_scale"):
        denoising_loss(KEY, model, x, noise_scale=0.0)


def labels_only(y):
    with numpyro.plate("data", len(y)):
        y = numpyro.sample("y", ebm.Counting(2), obs=y)
        ebm.energy("E", 0.3 * y)


def wells(data, depth=1.0):
    """exp(-E) = N(-2, ¼) + depth N(2, ¼) in both coordinates: Z = (1 + depth)²."""
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(event_shape=(2,)), obs=data)
        left, right = dist.Normal(-2.0, 0.5).log_prob(v), dist.Normal(2.0, 0.5).log_prob(v)
        ebm.energy("E", -jnp.sum(jnp.logaddexp(left, right + jnp.log(depth)), -1))


def draws_of_wells(num, depth):
    side = RNG.random((num, 2)) < depth / (1 + depth)
    return np.where(side, 2.0, -2.0) + 0.5 * RNG.normal(size=(num, 2))


@pytest.mark.slow
def test_bounds_of_a_log_likelihood_meet_at_the_truth():
    data, draws = draws_of_wells(100, 3.0), draws_of_wells(400, 3.0)
    model = ebm.fixed(wells, {})
    found = log_likelihood_bounds(KEY, model, data, draws, 3.0, num_temperatures=200)
    truth = 2 * np.log(4.0)
    assert np.all(np.abs(found.log_normalizer - truth) < 4 * found.log_normalizer_error)
    assert np.all(found.log_normalizer_error < 0.15)
    one = np.logaddexp(
        stats.norm(-2, 0.5).logpdf(data), stats.norm(2, 0.5).logpdf(data) + np.log(3)
    )
    exact = one.sum(-1) - truth
    np.testing.assert_allclose(found.by_row, exact, atol=0.4)
    np.testing.assert_allclose(found.by_row - found.by_row[0], exact - exact[0], atol=1e-3)
    assert found.lower - 0.4 < exact.mean() < found.upper + 0.4


def test_bounds_of_a_log_likelihood_of_rates_are_its_value():
    """A Gaussian in log v: one of the draws is nearly the model, and the bounds are close."""

    def log_normal(data):
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(support=dist.constraints.positive), obs=data)
            u = jnp.log(v)
            ebm.energy("E", 0.5 * (u - 0.4) ** 2 / 0.09 + u)

    law = stats.lognorm(0.3, scale=np.exp(0.4))
    data, draws = law.rvs((2, 400), random_state=3)
    data = data[:10]
    found = log_likelihood_bounds(KEY, ebm.fixed(log_normal, {}), data, draws, num_temperatures=10)
    exact, error = law.logpdf(data), found.log_normalizer_error
    truth = np.log(0.3 * np.sqrt(2 * np.pi))
    assert np.all(np.abs(found.log_normalizer - truth) < 4 * error) and np.all(error < 0.05)
    np.testing.assert_allclose(found.by_row, exact, atol=0.1)
    spread = np.var(found.by_row, ddof=1) / 10 + np.max(error) ** 2
    np.testing.assert_allclose(found.standard_error, np.sqrt(spread), rtol=1e-5)
    assert np.max(error) ** 2 > 1e-4 * spread
    # The estimate from the Gaussian is too small in expectation, that from the draws too large.
    bounds = np.mean(found.by_row) + np.mean(found.log_normalizer) - found.log_normalizer
    np.testing.assert_allclose([found.upper, found.lower], bounds, rtol=1e-5)


def test_moves_of_the_bounds_leave_a_skewed_law_as_it_is():
    """Draws of a Gumbel's law, after long steps of which many are refused."""
    z = jnp.asarray(stats.gumbel_l.rvs(size=(8_000, 1), random_state=4), jnp.float32)
    log_density = lambda z: jnp.sum(z - jnp.exp(z), -1)  # noqa: E731

    def run(z):
        step = lambda z, key: _langevin_move(key, log_density, z, 0.8)  # noqa: E731
        return jax.lax.scan(step, z, jax.random.split(KEY, 20))

    moved, accepted = jax.jit(run)(z)
    assert 0.5 < np.mean(accepted) < 0.95
    law = stats.gumbel_l
    assert stats.kstest(np.asarray(moved[:, 0]), law.cdf).pvalue > 1e-3


@pytest.mark.slow
def test_a_log_likelihood_that_is_not_known_is_refused():
    """Draws that miss three of the four modes, or are none of the model's; too quick a path."""
    model, data = ebm.fixed(wells, {}), draws_of_wells(50, 1.0)
    one_mode = -2 + 0.5 * RNG.normal(size=(400, 2))
    options = {"num_temperatures": 100}
    with pytest.raises(ebm.ModelError, match="not known well enough"):
        log_likelihood_bounds(KEY, model, data, one_mode, 30.0, **options)
    wrong = 3 * RNG.normal(size=(400, 2))
    with pytest.raises(ebm.ModelError, match="not known well enough"):
        log_likelihood_bounds(KEY, model, data, wrong, 1.0, num_temperatures=5)
    found = log_likelihood_bounds(
        KEY, model, data, wrong, 1.0, num_temperatures=5, tolerance=np.inf
    )
    assert np.isfinite(found.lower)
    with pytest.raises(ebm.ModelError, match="too few to fit"):
        log_likelihood_bounds(KEY, model, data, wrong[:8], 1.0)
    with pytest.raises(ebm.ModelError, match="num_temperatures"):
        log_likelihood_bounds(KEY, model, data, wrong, 1.0, num_temperatures=1)
