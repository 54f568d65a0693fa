# SPDX-License-Identifier: Apache-2.0
"""The self-normalised likelihood: a bound that touches, against enumeration and closed forms."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import oracles
import pytest
from contrast_cases import KEY, RNG, arrays, fitted_noise, grbm_log_z, one_dimensional, slow, train
from jax.scipy.special import gammaln
from numpyro.distributions import constraints
from oracles import assert_unbiased, draws, flat, jit

import numpyro_ebm as ebm
from numpyro_ebm.errors import FarNoiseWarning, ModelError

STATES = np.indices((3,) * 3).reshape(3, -1).T
PAIRS = RNG.normal(size=(3, 3)) * 0.7
LOGITS = np.array([0.3, -0.2, 0.1])
UNLIKE = dist.Categorical(logits=jnp.asarray(LOGITS)).expand([3]).to_event(1)


def potts(x):
    """Three sites of three values, with the same couplings between all."""
    J = numpyro.param("J", jnp.zeros((3, 3)))
    with numpyro.plate("data", len(x)):
        x = numpyro.sample("x", ebm.Counting(3, (3,)), obs=x)
        ebm.energy("E", -potts_density(J, x))


def potts_density(J, x):
    return J[x[..., 0], x[..., 1]] + J[x[..., 1], x[..., 2]] + 0.5 * J[x[..., 2], x[..., 0]]


@pytest.mark.parametrize("shift", [slow(0.0), -0.4, slow(0.7)])
def test_it_is_a_bound_that_touches_at_log_z(x64, shift):
    """Over draws of any noise; the sum over all states is the oracle."""
    x = RNG.integers(0, 3, (6, 3))
    log_z = jax.nn.logsumexp(potts_density(PAIRS, STATES))
    params = {"J": jnp.asarray(PAIRS), "log_normalizer": log_z + shift}

    def expected(p):
        here, b = jnp.mean(potts_density(p["J"], x)), p["log_normalizer"]
        return b - here - 1.0 + jnp.exp(jax.nn.logsumexp(potts_density(p["J"], STATES)) - b)

    def one(rng_key):
        objective = ebm.SelfNormalized(UNLIKE, 2)
        loss = lambda p: objective.loss(rng_key, p, potts, None, x)  # noqa: E731
        return jax.value_and_grad(loss)(params)

    found = jit(jax.value_and_grad(expected))(params)
    assert_unbiased(draws(one, KEY, 4_000), flat(found), f"{shift}")
    above = found[0] - (log_z - jnp.mean(potts_density(PAIRS, x)))
    np.testing.assert_allclose(above, shift + np.exp(-shift) - 1.0, atol=1e-12)


def positive(data):
    """The exponential of ``one_dimensional``, on the positive numbers."""
    m, t = numpyro.param("m", 0.0), numpyro.param("t", 1.0)
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(support=constraints.positive), obs=data)
        u = jnp.log(v)
        ebm.energy("E", 0.5 * t * u**2 - m * u + u)


def poisson(data):
    rate = numpyro.param("rate", 1.0)
    with numpyro.plate("data", len(data)):
        x = numpyro.sample("x", ebm.Counting(math.inf), obs=data)
        ebm.energy("E", gammaln(x + 1.0) - jnp.log(rate) * x)


NORMAL = {"m": 0.5, "t": 1.6}
LOG_Z = 0.5 * np.log(2 * np.pi / 1.6) + 0.5 * 0.5**2 / 1.6
# Members of one law: the model, its parameters, log Z, and the law itself.
SAME = {
    "real": (one_dimensional, NORMAL, LOG_Z, dist.Normal(0.5 / 1.6, 1.6**-0.5)),
    "positive": (positive, NORMAL, LOG_Z, dist.LogNormal(0.5 / 1.6, 1.6**-0.5)),
    "counts": (poisson, {"rate": 2.5}, 2.5, dist.Poisson(2.5)),
}


@pytest.mark.parametrize("name", [slow("real"), "positive", slow("counts")])
def test_with_the_model_as_noise_every_draw_is_the_likelihood(x64, name):
    model, params, log_z, noise = SAME[name]
    data = np.asarray(noise.sample(KEY, (7,)))
    objective = ebm.SelfNormalized(noise, 3)
    params = arrays({**params, "log_normalizer": log_z})
    loss = jit(lambda p, key: objective.loss(key, p, model, None, data))
    np.testing.assert_allclose(loss(params, KEY), -np.mean(noise.log_prob(data)), rtol=1e-9)
    problem = objective.prepare(KEY, params, model, None, (data,), {})
    overlap = jit(lambda p: objective.overlap(KEY, p, problem))(params)
    np.testing.assert_allclose(overlap, 1.0, rtol=1e-9)
    known = objective.log_normalizer(KEY, params, model, None, data, parameters_known=True)
    assert known.method == "SNL" and known.mcse < 1e-6


def test_the_error_of_b_at_known_parameters_is_that_of_importance_sampling(x64):
    rows, noise = 4_000, dist.Normal(0.0, 1.5)
    data = 0.5 / 1.6 + jax.random.normal(KEY, (rows,)) / np.sqrt(1.6)
    params = arrays({**NORMAL, "log_normalizer": LOG_Z})
    objective = ebm.SelfNormalized(noise, 2)
    known = objective.log_normalizer(
        jax.random.key(9), params, one_dimensional, None, data, parameters_known=True
    )
    v = np.linspace(-9.0, 9.0, 20_001)
    square = np.trapezoid(np.exp(-1.6 * v**2 + v - 2 * LOG_Z - np.asarray(noise.log_prob(v))), v)
    np.testing.assert_allclose(known.mcse, np.sqrt((square - 1.0) / (2 * rows)), rtol=0.15)
    np.testing.assert_allclose(known.ess, 2 * rows / square, rtol=0.1)
    # By the rows, where b is too low by one, and by the draws, where it is too high.
    p, q = np.exp(-0.8 * v**2 + 0.5 * v - LOG_Z), np.exp(np.asarray(noise.log_prob(v)))
    problem = objective.prepare(KEY, params, one_dimensional, None, (data,), {})
    overlap = jit(lambda b: objective.overlap(KEY, {**params, "log_normalizer": b}, problem))
    for shift, weight in ((-1.0, 1.0), (1.0, np.exp(-1.0))):
        exact = weight * np.trapezoid(2 * p * q / (p * np.exp(-shift) + q), v)
        np.testing.assert_allclose(overlap(LOG_Z + shift), exact, atol=0.03)


@pytest.mark.slow
def test_training_ends_at_the_likelihood_and_at_log_z():
    """Couplings, a fitted noise, and counts; the value is that of maximum likelihood."""
    p = np.exp(potts_density(PAIRS, STATES))
    data = STATES[RNG.choice(27, 3_000, p=p / p.sum())]
    fit = train(potts, ebm.SelfNormalized(UNLIKE, 4), data, 800)
    log_z = jax.nn.logsumexp(potts_density(fit.params["J"], STATES))
    np.testing.assert_allclose(fit.params["log_normalizer"], log_z, atol=0.03)
    exact = jit(lambda p: ebm.MaximumLikelihood().loss(KEY, p, potts, None, data))
    best = train(potts, ebm.MaximumLikelihood(), data, 800)
    least = exact({"J": best.params["J"]})
    assert exact({"J": fit.params["J"]}) - least < 0.005  # 8 parameters, 3,000 rows: 0.0013
    np.testing.assert_allclose(np.mean(fit.losses[-50:]), least, atol=0.02)

    real = 0.3 + 0.8 * jax.random.normal(KEY, (2_000,))
    fit = train(one_dimensional, ebm.SelfNormalized(fitted_noise, 2), real, 1_000)
    exact = 0.5 * np.log(2 * np.pi / fit.params["t"]) + 0.5 * fit.params["m"] ** 2 / fit.params["t"]
    np.testing.assert_allclose(fit.params["log_normalizer"], exact, atol=0.03)
    np.testing.assert_allclose(fit.params["t"] * jnp.var(real), 1.0, rtol=0.1)

    counts = RNG.poisson(2.5, 2_000)
    noise = ebm.SelfNormalized(dist.GeometricProbs(0.25), 4)
    fit = train(poisson, noise, counts, 600)
    np.testing.assert_allclose(fit.params["rate"], counts.mean(), rtol=0.05)
    np.testing.assert_allclose(fit.params["log_normalizer"], fit.params["rate"], atol=0.1)


@pytest.mark.slow
def test_any_guide_leaves_a_bound(x64):
    """The slope in b is 1 - Z exp(-b) with a wrong guide as well, and the loss is above."""
    system = oracles.with_learned_guide(oracles.grbm_system())
    params, data = dict(system.params), jnp.asarray(system.data)
    log_z, b = grbm_log_z(params), grbm_log_z(params) + 0.3
    params = arrays({**params, "A": params["A"] + 0.6, "log_normalizer": b})
    noise = dist.Normal(jnp.zeros(2), 2.0 * jnp.ones(2)).to_event(1)
    losses = {}
    for marginal in (ebm.ImportanceBound(3), ebm.Enumerated()):
        objective = ebm.SelfNormalized(noise, 4, marginal)

        def one(rng_key, objective=objective):
            problem = objective.prepare(KEY, params, system.model, system.guide, (data,), {})
            of = lambda b: objective.energy_loss(  # noqa: E731
                rng_key, {**params, "log_normalizer": b}, problem
            )
            return jax.value_and_grad(of)(params["log_normalizer"])

        found = draws(one, KEY, 4_000)
        assert_unbiased(found[:, 1:], np.array([1.0 - np.exp(log_z - b)]), "slope")
        losses[type(marginal).__name__] = found[:, 0]
    bound, exact = losses.values()
    error = np.hypot(bound.std(), exact.std()) / np.sqrt(len(bound))
    assert bound.mean() - exact.mean() > 4 * error


@pytest.mark.slow
def test_noise_far_from_the_rows_warns():
    data = jax.random.normal(KEY, (300,))
    far = ebm.SelfNormalized(dist.Normal(4.0, 0.3))
    with pytest.warns(FarNoiseWarning, match=r"SelfNorm.*almost no row lies where it has"):
        train(one_dimensional, far, data, 1, lr=1e-6)
    near = ebm.SelfNormalized(dist.Normal(0.0, 1.5))
    train(one_dimensional, near, data, 1)  # warnings are errors here


def test_what_does_not_go_together_is_refused():
    near = ebm.SelfNormalized(dist.Normal(0.0, 1.5))
    with pytest.raises(ModelError, match="the log Z that SelfNormalized learns"):
        near.log_normalizer(KEY, NORMAL, one_dimensional, None, jnp.arange(3.0))
    with pytest.raises(ModelError, match="SelfNormalized: `noise_ratio` must"):
        ebm.SelfNormalized(dist.Normal(0.0, 1.0), 0)
    with pytest.raises(ModelError, match="SelfNormalized: `noise_optim` is given"):
        ebm.SelfNormalized(dist.Normal(0.0, 1.0), noise_optim=numpyro.optim.Adam(0.1))
