# SPDX-License-Identifier: Apache-2.0
"""Plates that subsample themselves, and several visible sites."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import oracles
import pytest
from numpyro.distributions import constraints
from oracles import arrays, assert_unbiased, draws, flat, jit, value_and_gradient
from registry.objectives import SIGMA, expected_denoising, formulas

import numpyro_ebm as ebm

pytestmark = pytest.mark.usefixtures("x64")

FORMULAS = formulas("real")


@pytest.mark.slow
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
