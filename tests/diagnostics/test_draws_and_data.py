# SPDX-License-Identifier: Apache-2.0
"""Draws beside data: two-sample tests, Fréchet distances and nearest rows against closed forms."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import fft, stats

import numpyro_ebm as ebm
from numpyro_ebm.diagnostics import (
    cosine_features,
    frechet_distance,
    nearest_rows,
    two_sample_test,
)

KEY = jax.random.key(8)


def gaussians(num, other, size, shift=0.0, scale=1.0):
    keys = jax.random.split(KEY)
    x = jax.random.normal(keys[0], (num, size))
    return x, shift + scale * jax.random.normal(keys[1], (other, size))


def exact_mmd(size, shift, scale, length):
    """Squared MMD of N(0, I) and N(shift, scale² I): Gaussian integrals of a Gaussian kernel."""

    def mean_kernel(variance, gap):
        total = length**2 + variance
        return (length**2 / total) ** (size / 2) * np.exp(-0.5 * gap**2 * size / total)

    within = mean_kernel(2.0, 0.0) + mean_kernel(2 * scale**2, 0.0)
    return within - 2 * mean_kernel(1 + scale**2, shift)


@pytest.mark.parametrize(("shift", "scale"), [(0.6, 1.0), (0.0, 1.7), (-0.4, 0.5)])
def test_the_mmd_of_gaussians_is_the_closed_form(shift, scale):
    x, y = gaussians(300, 500, 3, shift, scale)
    found = two_sample_test(KEY, x, y, bandwidth=1.3, num_permutations=99)
    truth = exact_mmd(3, shift, scale, 1.3)
    assert abs(found.statistic - truth) < 4 * found.standard_error < 0.7 * truth
    assert found.p_value == 0.01


def test_the_mmd_is_its_sum_over_pairs():
    x, y = gaussians(7, 5, 2, 0.3)
    found = two_sample_test(KEY, x, y, bandwidth=0.8, num_permutations=9)

    def pairs(a, b, same):
        k = np.exp(-0.5 * np.square(a[:, None] - b[None]).sum(-1) / 0.8**2)
        return (k.sum() - len(a)) / (len(a) * (len(a) - 1)) if same else k.mean()

    x, y = np.asarray(x), np.asarray(y)
    expected = pairs(x, x, True) + pairs(y, y, True) - 2 * pairs(x, y, False)
    np.testing.assert_allclose(found.statistic, expected, rtol=1e-4)
    both = np.concatenate([x, y])
    gaps = np.sqrt(np.square(both[:, None] - both[None]).sum(-1))
    found = two_sample_test(KEY, x, y, num_permutations=9)
    np.testing.assert_allclose(found.bandwidth, np.median(gaps[np.triu_indices(12, 1)]), rtol=1e-5)


def test_the_error_of_the_mmd_is_its_scatter():
    def one(key):
        keys = jax.random.split(key)
        x, y = jax.random.normal(keys[0], (20, 2)), 0.7 + jax.random.normal(keys[1], (60, 2))
        return two_sample_test(key, x, y, bandwidth=1.0, num_permutations=1)

    found = jax.jit(jax.vmap(one))(jax.random.split(KEY, 400))
    assert 0.85 < found.standard_error.mean() / found.statistic.std() < 1.15


@pytest.mark.slow
@pytest.mark.parametrize("statistic", ["mmd", "neighbours"])
def test_permutations_give_uniform_p_values_under_one_law(statistic):
    """400 pairs of samples of one skewed law, unequal in number; and power against another."""

    def p_value(key, scale):
        key_x, key_y, key = jax.random.split(key, 3)
        x = jax.random.exponential(key_x, (30, 2))
        y = scale * jax.random.exponential(key_y, (20, 2))
        options = {"statistic": statistic, "num_permutations": 199}
        return two_sample_test(key, x, y, **options).p_value

    keys = jax.random.split(KEY, 400)
    found = np.asarray(jax.jit(jax.vmap(lambda key: p_value(key, 1.0)))(keys))
    if statistic == "mmd":  # the other has few values: its p-values are large rather than small
        assert stats.kstest(found, "uniform").pvalue > 1e-3
    for level in (0.05, 0.2):
        error = np.sqrt(level * (1 - level) / 400)
        assert np.mean(found <= level) < level + 3 * error
    found = jax.jit(jax.vmap(lambda key: p_value(key, 3.0)))(keys[:100])
    assert np.mean(found <= 0.05) > 0.5


def test_the_nearest_neighbour_is_a_classifier():
    x, y = gaussians(40, 60, 2, 0.8)
    found = two_sample_test(KEY, x, y, statistic="neighbours", num_permutations=99)
    both, label = np.concatenate([x, y]), np.arange(100) < 40
    gaps = np.square(both[:, None] - both[None]).sum(-1) + np.diag(np.full(100, np.inf))
    right = (label == label[gaps.argmin(1)]).mean()
    np.testing.assert_allclose(found.statistic, right, rtol=1e-6)
    np.testing.assert_allclose(found.standard_error, np.sqrt(right * (1 - right) / 100), rtol=1e-5)
    assert found.p_value < 0.05 and found.null.shape == (99,)
    found = two_sample_test(KEY, x[:6], y[:5], statistic="neighbours", num_permutations=99)
    assert jnp.any(found.null == found.statistic)  # ties count
    np.testing.assert_allclose(
        found.p_value, (1 + np.sum(found.null >= found.statistic)) / 100, rtol=1e-6
    )


def test_the_frechet_distance_of_gaussians_is_the_closed_form():
    """Covariances that do not commute: tr (C₁ C₂)^½ by the eigenvalues of the product."""
    rng = np.random.default_rng(0)
    mean, mix = np.array([0.5, -0.3, 0.2]), rng.normal(size=(3, 3))
    x, y = gaussians(4_000, 6_000, 3)
    y = y @ jnp.asarray(mix.T, jnp.float32) + jnp.asarray(mean, jnp.float32)
    found = frechet_distance(KEY, x, y, num_bootstrap=50)
    cov = mix @ mix.T
    root = np.sqrt(np.linalg.eigvals(cov).real).sum()
    truth = mean @ mean + 3 + np.trace(cov) - 2 * root
    assert abs(found.value - found.baseline - truth) < 4 * found.standard_error < 0.3 * truth
    first, second = np.cov(np.asarray(x).T), np.cov(np.asarray(y).T)
    root = np.sqrt(np.linalg.eigvals(first @ second).real).sum()
    gap = np.mean(x, 0) - np.mean(y, 0)
    exact = gap @ gap + np.trace(first) + np.trace(second) - 2 * root
    np.testing.assert_allclose(found.value, exact, rtol=1e-3)


def test_a_sample_beside_itself_has_an_error():
    """Rows of both samples are drawn each by themselves: 2 Var(mean) + O(1/n²) in one dimension."""
    x = jax.random.normal(KEY, (400, 1))
    found = frechet_distance(KEY, x, x, num_bootstrap=400)
    # n d² = 2 χ² of the means + χ² of the deviations, and d² of two such samples again.
    np.testing.assert_allclose(found.value, 0.0, atol=1e-5)
    exact = np.sqrt(2 * 2**2 + 2 * 1**2) / 400
    assert 0.75 < found.standard_error / exact < 1.25
    assert 0.75 < found.baseline / (3 / 400) < 1.25


@pytest.mark.slow
def test_the_error_and_the_baseline_of_a_frechet_distance():
    def found(key, scale):
        keys = jax.random.split(key, 3)
        x = jax.random.normal(keys[0], (60, 2))
        y = scale * jax.random.normal(keys[1], (90, 2))
        return frechet_distance(keys[2], x, y, num_bootstrap=40)

    keys = jax.random.split(KEY, 200)
    same = jax.jit(partial(jax.lax.map, lambda key: found(key, 1.0)))(keys)
    error = same.value.std() / np.sqrt(200)
    assert abs(same.value.mean() - same.baseline.mean()) < 4 * error
    other = jax.jit(partial(jax.lax.map, lambda key: found(key, 2.0)))(keys)
    assert 0.8 < other.standard_error.mean() / other.value.std() < 1.25


def test_cosine_features_are_the_cosine_transform():
    images = np.random.default_rng(0).normal(size=(3, 8, 6))
    expected = fft.dctn(images, axes=(1, 2), norm="ortho")[:, :3, :3].reshape(3, 9)
    np.testing.assert_allclose(cosine_features(images, 3), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        cosine_features(images.reshape(3, 1, 48), 3, shape=(8, 6)), expected, rtol=1e-4, atol=1e-5
    )
    with pytest.raises(ebm.ModelError, match="frequencies"):
        cosine_features(images, 7)


def test_copies_are_told_from_draws():
    data, fresh = gaussians(200, 150, 4)
    draws = jax.random.normal(jax.random.key(1), (120, 4))
    found = nearest_rows(draws, data, held_out=fresh, num_neighbours=3)
    gaps = np.sqrt(np.square(np.asarray(draws)[:, None] - np.asarray(data)[None]).sum(-1))
    np.testing.assert_array_equal(found.nearest, np.argsort(gaps, 1)[:, :3])
    np.testing.assert_allclose(found.distance, np.sort(gaps, 1)[:, :3], rtol=1e-4)
    assert abs(found.closer.value - 0.5) < 4 * found.closer.standard_error
    copies = nearest_rows(data[:120] + 1e-3, data, held_out=fresh, num_neighbours=3)
    assert copies.closer.value > 0.99 and copies.nearest[:, 0].tolist() == list(range(120))
    far = nearest_rows(draws + 3.0, data, held_out=fresh, num_neighbours=3)
    assert far.closer.value < 0.1
    assert nearest_rows(draws, data, num_neighbours=3).closer is None


def test_samples_that_do_not_fit_are_refused():
    x, y = gaussians(10, 10, 3)
    for call in (two_sample_test, frechet_distance, lambda key, *rows: nearest_rows(*rows)):
        with pytest.raises(ebm.ModelError, match="3, 2 entries"):
            call(KEY, x, y[:, :2])
        with pytest.raises(ebm.ModelError, match="two rows"):
            call(KEY, x[:1], y)
    with pytest.raises(ebm.ModelError, match="covariance"):
        frechet_distance(KEY, x[:3], y)
    with pytest.raises(ebm.ModelError, match="num_permutations"):
        two_sample_test(KEY, x, y, num_permutations=0)
    with pytest.raises(ebm.ModelError, match="bandwidth"):
        two_sample_test(KEY, x, y, bandwidth=-1.0)
    with pytest.raises(ebm.ModelError, match="statistic"):
        two_sample_test(KEY, x, y, statistic="energy")
    with pytest.raises(ebm.ModelError, match="11 neighbours"):
        nearest_rows(x, y, num_neighbours=11)
