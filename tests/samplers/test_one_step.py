# SPDX-License-Identifier: Apache-2.0
"""What single steps draw, before a test makes up for it or many steps hide it."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from numpyro_ebm.samplers import annealed, discrete_langevin, exchange, langevin
from numpyro_ebm.samplers.chromatic_gibbs import _polynomial_logits

NUM = 40_000
KEY = jax.random.key(4)


@pytest.mark.parametrize("differences", ["gradient", "exact"])
def test_a_proposal_of_discrete_langevin_is_that_of_the_paper(differences):
    """log q(y | x) is (log p̃(y) - log p̃(x)) / 2 - (y - x)² / 2α, for three values from 0."""
    values = {"s": np.arange(3)}

    def log_density(x):
        return 1.2 * x["s"][:, 0]

    kernel = discrete_langevin.build_kernel(False, differences)
    position = {"s": jnp.zeros((NUM, 1), int)}
    state = discrete_langevin.init(position, log_density, values, differences)
    step = jax.jit(lambda key: kernel(key, state, log_density, 0.8, values)[0].position["s"])
    found = np.bincount(np.ravel(step(jax.random.key(3))), minlength=3) / NUM
    x = np.arange(3.0)
    distance = x**2 if differences == "gradient" else 1.0 * (x > 0)
    p = np.asarray(jax.nn.softmax(0.6 * x - distance / 1.6))
    assert np.all(np.abs(found - p) < 4.5 * np.sqrt(p * (1 - p) / NUM))


def test_a_proposal_of_exchange_follows_the_gradient_in_its_scale():
    """θ' is normal around θ + ε² L Lᵀ g / 2 with covariance ε² L Lᵀ, and L is not symmetric."""
    scale, slope, step = jnp.array([[2.0, 0.0], [1.5, 0.5]]), jnp.array([0.4, -0.3]), 0.7
    position = jnp.tile(jnp.array([1.0, -2.0]), (NUM, 1))
    zero, data = lambda *_: jnp.zeros(NUM), jnp.zeros(NUM)
    slopes = lambda x: jnp.broadcast_to(slope, x.shape)  # noqa: E731
    state = exchange.init(position, data, zero, zero, slopes)
    ones = jnp.ones(NUM)
    _, info = exchange.build_kernel()(
        *(jax.random.key(3), state, data, zero, zero, lambda key, x: (data, data, None)),
        *(step * ones, jnp.broadcast_to(scale, (NUM, 2, 2)), slopes),
    )
    moved = np.asarray(info.proposal - position)
    covariance = np.asarray(step**2 * scale @ scale.T)
    error = np.sqrt(np.diag(covariance) / NUM)
    assert np.all(np.abs(moved.mean(0) - covariance @ slope / 2) < 4 * error)
    np.testing.assert_allclose(np.cov(moved.T), covariance, atol=0.05)


def test_a_drift_is_held_within_its_bound():
    """Each coordinate by itself, on both sides; the noise stays as it is."""
    slopes = {"a": jnp.array([3.0, -40.0, 500.0]), "b": jnp.array(-1.0)}

    def flat(x):
        return 0.0 * (jnp.sum(x["a"]) + x["b"])

    def steep(x):
        return jnp.sum(slopes["a"] * x["a"]) + slopes["b"] * x["b"]

    start, key, kernel = {"a": jnp.arange(3.0), "b": jnp.array(1.0)}, KEY, langevin.build_kernel()
    still, _ = kernel(key, langevin.init(start, flat), flat, 0.1)
    for bound, expected in ((1.0, [0.3, -1.0, 1.0]), (None, [0.3, -4.0, 50.0])):
        moved, _ = kernel(key, langevin.init(start, steep), steep, 0.1, bound)
        drift = jax.tree.map(jnp.subtract, moved.position, still.position)
        np.testing.assert_allclose(drift["a"], expected, rtol=1e-5)
        np.testing.assert_allclose(drift["b"], -0.1, rtol=1e-5)
        np.testing.assert_array_equal(moved.logdensity_grad["a"], slopes["a"])  # not the bounded


def test_an_annealed_run_starts_at_its_own_scale():
    """With steps of no size it ends where it started."""
    kernel = annealed.build_kernel(1)
    levels, steps = jnp.array([1.0, 2.0]), jnp.array([1e-12, 1e-12])

    def log_density(x, level):
        return -0.5 * level * jnp.sum(x**2)

    state = annealed.init(jnp.zeros(NUM), log_density, levels)
    new, _ = kernel(jax.random.key(3), state, log_density, levels, steps, 2.5)
    assert np.std(new.position) == pytest.approx(2.5, rel=0.02)


def test_log_ratios_of_a_polynomial_are_its_differences():
    """Through nodes of a quadrature of its gradient: of a cubic, for values that are unequal."""
    table = np.array([[0.0, 1.0, 3.0], [-1.0, 0.5, 2.0]])

    def log_density(x):
        return x[:, 0] ** 3 - 2 * x[:, 0] ** 2 + x[:, 1] ** 3 + x[:, 0] * x[:, 1]

    flat, block = jnp.array([[1.0, 2.0]]), SimpleNamespace(degree=3)
    for i in range(2):
        moving = jnp.arange(2) == i
        found = _polynomial_logits(log_density, flat, moving, table, block)[:, 0, i]
        values = log_density(flat.repeat(3, 0).at[:, i].set(table[i]))
        np.testing.assert_allclose(found, values - values[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tethers", [None, jnp.array([2.0, 5.0])])
def test_a_denoised_position_has_the_density_of_the_last_level(tethers):
    """Levels that are precisions: the step without noise is by that of the last one, untethered."""
    levels, sizes = jnp.array([1.0, 3.0]), jnp.array([0.1, 0.05])
    kernel = annealed.build_kernel(2)

    def log_density(x, level):
        return -0.5 * level * jnp.sum((x - 1) ** 2)

    first = annealed.init(jnp.zeros(2), log_density, levels)
    args = (jax.random.key(0), first, log_density, levels, sizes, 1.0)
    noisy, new = (kernel(*args, variance, tethers)[0] for variance in (None, 0.2))
    np.testing.assert_allclose(noisy.logdensity, log_density(noisy.position, 3.0), rtol=1e-5)
    np.testing.assert_allclose(new.position, noisy.position - 0.6 * (noisy.position - 1), rtol=1e-5)
    np.testing.assert_allclose(new.logdensity, log_density(new.position, 3.0), rtol=1e-5)
    np.testing.assert_allclose(new.logdensity_grad, -3.0 * (new.position - 1), rtol=1e-5)
