# SPDX-License-Identifier: Apache-2.0
"""Acceptance probabilities of single steps, by densities and by proposals there and back."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from numpyro_ebm.samplers import discrete_langevin, exchange, tempering

NUM = 400


def log_normal(x, mean, variance):
    """Log-density of independent coordinates, but for its constant."""
    return -0.5 * np.sum((x - mean) ** 2 / variance, -1)


def test_a_move_of_a_replica_is_that_of_mala_at_its_temperature():
    beta, step = 0.3, 0.5

    def prior(x):
        return -0.5 * jnp.sum((x - 1.0) ** 2)

    def likelihood(x):
        return -jnp.sum(x**4) + x[0] * x[1]

    x = np.random.default_rng(0).normal(size=(NUM, 2)).astype("float32")
    keys = jax.random.split(jax.random.key(3), NUM)

    @jax.jit
    @jax.vmap
    def move(key, x):
        start = tempering.evaluate(x, prior, likelihood)
        return tempering.move(key, start, prior, likelihood, beta, step)

    new, found = move(keys, x)
    y = np.asarray(new.position)
    parts = -0.5 * np.sum((y - 1.0) ** 2, 1), y[:, 0] * y[:, 1] - np.sum(y**4, 1)
    there, back = (a + step * (1 - a + beta * (a[:, ::-1] - 4 * a**3)) for a in (x, y))
    ratio = (
        parts[0]
        + beta * parts[1]
        - (-0.5 * np.sum((x - 1.0) ** 2, 1) + beta * (x[:, 0] * x[:, 1] - np.sum(x**4, 1)))
    )
    ratio = ratio + log_normal(x, back, 2 * step) - log_normal(y, there, 2 * step)
    moved = np.any(y != x, 1)
    assert 0.3 < moved.mean() < 0.9
    np.testing.assert_allclose(found[moved], np.exp(np.minimum(ratio, 0))[moved], rtol=2e-3)
    np.testing.assert_allclose(new.logprior, parts[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(new.loglikelihood, parts[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("differences", ["gradient", "exact"])
def test_a_test_of_discrete_langevin_weighs_proposals_of_unequal_sites(differences):
    """Of two values and of three, with a step size of each row."""
    values = {"a": np.array([0, 1]), "b": np.array([0, 2, 3])}
    table = [values["a"], values["b"], values["b"]]
    step = np.linspace(0.5, 3.0, NUM)

    def log_density(x):
        a, b = x["a"][:, 0] * 1.0, x["b"] * 1.0
        return 0.8 * a * b[:, 0] - 0.5 * b[:, 0] * b[:, 1] + 0.1 * b[:, 1] ** 3 - 0.3 * b[:, 0] ** 2

    def position(flat):
        return {"a": flat[:, :1], "b": flat[:, 1:]}

    def slopes(x):
        a, b, c = x.T
        return 0.8 * b, 0.8 * a - 0.5 * c - 0.6 * b, 0.3 * c**2 - 0.5 * b

    def changes(x):
        """Of the log-density when a coordinate takes each of its values, (values, rows)."""
        if differences == "gradient":
            return [
                g * (t[:, None] - x[:, i])
                for i, (g, t) in enumerate(zip(slopes(x), table, strict=True))
            ]
        here, found = log_density(position(x)), []
        for i in range(3):
            others = [x.copy() for _ in table[i]]
            for y, value in zip(others, table[i], strict=True):
                y[:, i] = value
            found.append(np.stack([log_density(position(y)) - here for y in others]))
        return found

    def log_proposal(x, y):
        total = 0.0
        for i, change in enumerate(changes(x)):
            apart = table[i][:, None] - x[:, i]
            distance = apart**2 if differences == "gradient" else apart != 0
            logits = 0.5 * change - distance / (2 * step)
            log_q = logits - np.logaddexp.reduce(logits, 0)
            total = total + np.sum(np.where(table[i][:, None] == y[:, i], log_q, 0.0), 0)
        return total

    x = np.tile([1, 3, 0], (NUM, 1))
    start = {k: jnp.asarray(v) for k, v in position(x).items()}
    kernel = partial(discrete_langevin.build_kernel(True, differences), logdensity_fn=log_density)

    @jax.jit
    def run(key):
        state = discrete_langevin.init(start, log_density, values, differences)
        return kernel(key, state, step_size=step, values=values)

    new, info = run(jax.random.key(5))
    y = np.concatenate([new.position["a"], new.position["b"]], 1)
    ratio = log_density(position(y)) - log_density(position(x))
    ratio = ratio + log_proposal(y, x) - log_proposal(x, y)
    taken = np.asarray(info.is_accepted)
    assert 0.3 < taken.mean() < 1 and np.all(y[~taken] == x[0])
    rate = np.exp(np.minimum(ratio, 0.0))
    np.testing.assert_allclose(info.acceptance_rate[taken], rate[taken], rtol=1e-3)
    np.testing.assert_allclose(new.logdensity, log_density(position(y)), rtol=1e-5, atol=1e-5)
    for i, change in enumerate(changes(y)):  # those of where it is now
        found = new.differences[: len(table[i]), :, i]
        np.testing.assert_allclose(found, change, rtol=1e-4, atol=1e-4)
    assert len(np.unique(y, axis=0)) > 6


@pytest.mark.parametrize("num_bridges", [0, 2])
def test_an_exchange_weighs_data_priors_and_proposals(num_bridges):
    """Of a Gaussian precision exp(θ₀) and mean θ₁, with a drift that is not its gradient."""
    scale = np.array([[1.2, 0.0], [0.7, 0.4]])
    data, step = np.array([0.4, -1.0, 2.0]), 0.6

    def log_prior(theta):
        return -0.125 * (theta**2).sum(-1)

    def log_density(theta, x, xp=jnp):
        return -0.5 * xp.exp(theta[:, 0]) * ((x - theta[:, 1:]) ** 2).sum(-1)

    def gradient(theta, xp=jnp):
        return xp.stack([1.5 - theta[:, 0], 0.4 * theta[:, 1]], 1)

    def simulate(key, theta):
        noise = jax.random.normal(key, (len(theta), 3))
        y = theta[:, 1:] + noise * jnp.exp(-0.5 * theta[:, :1])
        return 0.5 * y, y, None

    def transition(key, theta, y):
        return y + 0.1 * theta[:, 1:]

    theta = np.random.default_rng(2).normal(size=(NUM, 2)).astype("float32")

    @jax.jit
    def step_of_all(key):
        state = exchange.init(jnp.asarray(theta), data, log_prior, log_density, gradient)
        return exchange.build_kernel(num_bridges)(
            *(key, state, jnp.asarray(data), log_prior, log_density, simulate),
            *(jnp.full(NUM, step), jnp.tile(scale, (NUM, 1, 1)), gradient, transition),
        )

    new, info = jax.tree.map(np.asarray, step_of_all(jax.random.key(7)))
    moved, inverse = info.proposal, np.linalg.inv(scale)

    def log_proposal(x, y):
        mean = x + 0.5 * step**2 * gradient(x, np) @ scale @ scale.T
        return log_normal((y - mean) @ inverse.T, 0.0, step**2)

    def density(*args):
        return log_density(*args, np)

    ratio = log_prior(moved) - log_prior(theta) + density(moved, data) - density(theta, data)
    ratio += log_proposal(moved, theta) - log_proposal(theta, moved)
    y, at = info.fictitious, moved
    for k in range(num_bridges + 1):
        after = moved + (theta - moved) * (k + 1) / (num_bridges + 1)
        y = transition(None, at, y) if k else y
        ratio += density(after, y) - density(at, y)
        at = after
    rate = np.exp(np.minimum(ratio, 0.0))
    np.testing.assert_allclose(info.acceptance_rate, rate, rtol=2e-3, atol=1e-6)
    taken = info.is_accepted
    assert abs(taken.mean() - rate.mean()) < 4 * 0.5 / NUM**0.5
    x = np.where(taken[:, None], moved, theta)
    for found, kept in zip(new, (x, log_prior(x), density(x, data), gradient(x, np)), strict=True):
        np.testing.assert_allclose(found, kept, rtol=1e-4, atol=1e-5)
    for i, y in enumerate((data, info.halfway, info.fictitious)):
        np.testing.assert_allclose(info.log_densities[i], density(moved, y), rtol=1e-4, atol=1e-5)
        apart = density(moved, y) - density(theta, y)
        np.testing.assert_allclose(info.log_ratios[i], apart, rtol=1e-3, atol=1e-4)


def test_a_drift_far_out_is_as_long_as_it_may_be():
    """In whitened coordinates, by the root of the dimension; shorter ones are as they are."""
    scale = jnp.array([[[1.0, 0.0], [0.0, 2.0]]] * 2)
    found = exchange._drift(jnp.array([[300.0, 200.0], [1.0, -2.0]]), scale)
    longest = exchange.LONGEST_DRIFT * 2**0.5
    np.testing.assert_allclose(found[0], longest * np.array([0.6, 0.8]), rtol=1e-6)
    np.testing.assert_allclose(found[1], [1.0, -4.0])
