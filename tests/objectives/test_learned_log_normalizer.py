# SPDX-License-Identifier: Apache-2.0
"""The log Z that noise contrast learns, its error, and noise that is far."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import oracles
import pytest
from contrast_cases import (
    KEY,
    RNG,
    gaussian_draws,
    gaussian_log_z,
    grbm_log_z,
    log_normal,
    one_dimensional,
    slow,
    train,
)
from jax.nn import softplus
from numpyro.handlers import scale
from oracles import jit
from scipy import stats

import numpyro_ebm as ebm
from numpyro_ebm.errors import FarNoiseWarning, ModelError


def check_log_z(objective, model, params, data, exact):
    result = objective.log_normalizer(jax.random.key(7), params, model, None, data)
    error = float(result.value) - exact(params)
    z = error / float(result.mcse)
    print(f"log Z: {float(result.value):.4f} ± {float(result.mcse):.4f}, off by {z:.2f} errors")
    assert result.method == "NCE" and result.value == params["log_normalizer"]
    assert 0 < result.mcse < 0.2 and abs(z) < 4
    assert 100 < result.ess < len(data) * objective.noise_ratio
    known = objective.log_normalizer(
        jax.random.key(7), params, model, None, data, parameters_known=True
    )
    print(f"  parameters known: ± {float(known.mcse):.4f}")
    assert known.value == result.value
    return result, known


@pytest.mark.slow
def test_log_z_of_a_gaussian():
    """Its precision has a direction that the loss does not see, the antisymmetric one."""
    data = jnp.asarray(gaussian_draws(2_000), jnp.float32)
    objective = ebm.NCE(dist.Normal(0, 1.5).expand([2]).to_event(1), 2)
    fit = train(oracles.gaussian, objective, data, 600)

    def exact(p):
        return gaussian_log_z({"precision": 0.5 * (p["precision"] + p["precision"].T)})

    result, known = check_log_z(objective, oracles.gaussian, fit.params, data, exact)
    assert 0 < known.mcse <= result.mcse


@pytest.mark.slow
def test_log_z_of_a_grbm(x64):
    model = partial(ebm.models.grbm, num_hidden=2)
    params = {**oracles.GRBM, "W": oracles.GRBM["W"][:, :2], "c": oracles.GRBM["c"][:2]}
    data = jnp.asarray(oracles.grbm_draws(params, 2_000, RNG))
    objective = ebm.NCE(dist.Normal(jnp.mean(data, 0), 1.2 * jnp.std(data, 0)).to_event(1), 3)
    fit = train(model, objective, data, 1_000)
    result, known = check_log_z(objective, model, fit.params, data, grbm_log_z)
    assert 0 < known.mcse <= result.mcse


def newton_nce(data, noise, ratio, known):
    """NCE of ``one_dimensional`` is a logistic regression: t, m and log Z, by Newton's method."""

    def loss(x):
        t, m, log_z = x

        def G(v):
            log_q = log_normal(v[..., None], 0.0, 1.5)
            return -0.5 * t * v**2 + m * v - log_z - jnp.log(ratio) - log_q

        return jnp.mean(softplus(-G(data))) + jnp.mean(jnp.sum(softplus(G(noise)), 0))

    def step(x, _):
        gradient, hessian = jax.grad(loss)(x), jax.hessian(loss)(x)
        if known:
            return x - jnp.array([0.0, 0.0, gradient[2] / hessian[2, 2]]), None
        return x - jnp.linalg.solve(hessian, gradient), None

    start = jnp.array([1.6, 0.5, 0.9])
    x, _ = jax.lax.scan(step, start, length=8)
    gradient = jax.grad(loss)(x)
    return x, gradient[2:] if known else gradient


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("ratio", "known"), [slow(1, False), slow(1, True), (4, False), slow(4, True)]
)
def test_the_error_of_log_z_is_honest(ratio, known):
    """z-scores of many repeats have standard deviation 1, and a mean that falls as 1/√rows."""
    truth, repeats, rows = (1.6, 0.5), 300, 500
    objective = ebm.NCE(dist.Normal(0.0, 1.5), ratio)

    def one(rng_key):
        key_data, key_noise, key_error = jax.random.split(rng_key, 3)
        data = truth[1] / truth[0] + jax.random.normal(key_data, (rows,)) / np.sqrt(truth[0])
        noise = 1.5 * jax.random.normal(key_noise, (ratio, rows))
        x, gradient = newton_nce(data, noise, ratio, known)
        params = {"t": x[0], "m": x[1], "log_normalizer": x[2]}
        result = objective.log_normalizer(
            key_error, params, one_dimensional, None, data, parameters_known=known
        )
        exact = 0.5 * jnp.log(2 * jnp.pi / x[0]) + 0.5 * x[1] ** 2 / x[0]
        return (result.value - exact) / result.mcse, gradient

    z, gradient = jit(jax.vmap(one))(jax.random.split(jax.random.key(5), repeats))
    np.testing.assert_allclose(gradient, 0.0, atol=1e-9)
    z = np.asarray(z)
    print(f"z: mean {z.mean():.3f}, standard deviation {z.std():.3f}")
    assert abs(z.mean()) < 0.35 and 0.83 < z.std() < 1.17


def test_the_error_of_log_z_is_that_of_the_optimal_bridge():
    """Var = 2 (1/A - 1) / n of as much noise as rows, A = ∫ 2 p q / (p + q) (Meng, Wong 1996)."""
    num, x = 4_000, np.linspace(-15, 15, 4_001)
    p, q = stats.norm.pdf(x, 0.5, 0.8), stats.norm.pdf(x, 0.0, 1.5)
    overlap = np.trapezoid(2 * p * q / (p + q), x)
    t = 1 / 0.64
    params = {"t": t, "m": 0.5 * t, "log_normalizer": 0.5 * np.log(2 * np.pi / t) + 0.125 * t}
    params = jax.tree.map(jnp.asarray, params)
    data = 0.5 + 0.8 * jax.random.normal(KEY, (num,))
    found = ebm.NCE(dist.Normal(0.0, 1.5)).log_normalizer(
        jax.random.key(7), params, one_dimensional, None, data, parameters_known=True
    )
    np.testing.assert_allclose(found.mcse, np.sqrt(2 * (1 / overlap - 1) / num), rtol=0.1)


@pytest.mark.usefixtures("x64")
def test_the_error_of_log_z_is_the_sandwich_of_all_parameters():
    """√(gᵀ J⁻¹ S J⁻ᵀ g / n) written out, with weights of rows, and the way left to the optimum."""
    num, key, rng = 40, jax.random.key(7), np.random.default_rng(2)
    data, weights = rng.normal(0.3, 0.8, num), rng.uniform(0.5, 2.0, num)
    model, args = scale(one_dimensional, scale=jnp.asarray(weights)), (jnp.asarray(data),)
    objective = ebm.NCE(dist.Normal(0.0, 1.5), 2)
    params = {"t": jnp.array(1.5), "m": jnp.array(0.5), "log_normalizer": jnp.array(2.1)}
    found = objective.log_normalizer(key, params, model, None, *args)

    key_prepare, key_draw = jax.random.split(key)
    problem = objective.prepare(key_prepare, params, model, None, args, {})

    @jit
    def contrast(t, m):  # linear in both
        at_data, at_noise = objective.contrast(key_draw, {"t": t, "m": m}, problem)
        return jnp.concatenate([at_data[None], at_noise])

    none, t, m = contrast(0.0, 0.0), contrast(1.0, 0.0), contrast(0.0, 1.0)
    features = np.stack([t - none, m - none, -np.ones((3, num))], -1)
    G = none + features @ [1.5, 0.5, 2.1] - np.log(2)
    sign = np.array([-1.0, 1.0, 1.0])[:, None]
    slopes, curves = sign / (1 + np.exp(-sign * G)), 1 / (2 + np.exp(G) + np.exp(-G))
    gradients = np.einsum("r,jr,jri->ri", weights, slopes, features)
    hessian = np.einsum("r,jr,jri,jrk->ik", weights, curves, features, features) / num
    towards = np.append(-np.average(features[0, :, :2], 0, weights), 1.0)
    influence = gradients @ np.linalg.solve(hessian, towards)
    variance, step = np.var(influence, ddof=1) / num, np.mean(influence)
    assert step**2 > 9 * variance
    np.testing.assert_allclose(found.mcse, np.sqrt(variance + step**2), rtol=1e-6)


def wide(data):
    w = numpyro.param("w", jnp.zeros(2_001))
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", 0.5 * v**2 * jnp.exp(jnp.sum(w)))


def test_log_normalizer_says_what_it_cannot_do():
    objective = ebm.NCE(dist.Normal(0, 1.5))
    data = jax.random.normal(KEY, (50,))
    params = {"w": jnp.zeros(2_001), "log_normalizer": jnp.array(0.9)}
    with pytest.raises(ModelError, match="2002 parameters.*`parameters_known=True`"):
        objective.log_normalizer(KEY, params, wide, None, data)
    known = objective.log_normalizer(KEY, params, wide, None, data, parameters_known=True)
    assert 0 < known.mcse < 1
    with pytest.raises(ModelError, match="lacks 'log_normalizer'"):
        objective.log_normalizer(KEY, {"w": jnp.zeros(2_001)}, wide, None, data)


def of_a_tree(data):
    p: Any = numpyro.param("p", {"t": jnp.array(1.2), "m": jnp.array(0.4)})
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", 0.5 * p["t"] * v**2 - p["m"] * v)


def test_a_parameter_may_be_a_tree_as_that_of_a_network():
    data, p = jax.random.normal(KEY, (50,)), {"t": jnp.array(1.2), "m": jnp.array(0.4)}
    params = {"p": p, "log_normalizer": jnp.array(0.9)}
    result = ebm.NCE(dist.Normal(0, 1.5)).log_normalizer(KEY, params, of_a_tree, None, data)
    assert result.value == params["log_normalizer"] and 0 < result.mcse < 1


@pytest.mark.slow
def test_far_noise_warns_and_near_noise_does_not():
    data = jax.random.normal(KEY, (500,))
    far = ebm.NCE(dist.Normal(30.0, 0.1))
    with pytest.warns(FarNoiseWarning, match="far from the data"):
        fit = train(one_dimensional, far, data, 5)
    with pytest.warns(FarNoiseWarning, match="ConditionalNCE"):
        far.log_normalizer(KEY, fit.params, one_dimensional, None, data)
    near = ebm.NCE(dist.Normal(0.0, 1.5))
    train(one_dimensional, near, data, 5)  # warnings are errors here


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("ratio", [1, 4])
def test_overlap_is_one_where_noise_and_model_are_the_same(ratio):
    data = jax.random.normal(KEY, (20_000,))
    params = {"t": jnp.array(1.0), "m": jnp.array(0.0)}
    params["log_normalizer"] = jnp.array(0.5 * np.log(2 * np.pi))
    objective = ebm.NCE(dist.Normal(0.0, 1.0), ratio)

    @jit
    def overlap(params):
        thrice = scale(one_dimensional, scale=3.0)
        problem = objective.prepare(KEY, params, thrice, None, (data,), {})
        return objective.overlap(KEY, params, problem)

    np.testing.assert_allclose(overlap(params), 1.0, rtol=1e-9)  # whatever the rows weigh
    found = objective.log_normalizer(KEY, params, one_dimensional, None, data[:200])
    np.testing.assert_allclose(found.ess, 200 * ratio, rtol=1e-6)  # no draw counts for more
