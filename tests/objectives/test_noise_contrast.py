# SPDX-License-Identifier: Apache-2.0
"""Noise contrast against its formulas: quadrature over the noise, closed forms and log Z."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import oracles
import pytest
from contrast_cases import (
    KEY,
    LOC,
    RNG,
    SCALE,
    arrays,
    conditional,
    gaussian_draws,
    gaussian_log_z,
    grbm_log_z,
    log_ratio,
    make,
    normal_grid,
    one_dimensional,
    ranking,
    ratios,
    slow,
    train,
    value_and_gradient,
)
from jax.nn import softplus
from numpyro.infer import SVI
from oracles import assert_unbiased, draws, flat, jit, z_scores

import numpyro_ebm as ebm
from numpyro_ebm.errors import ModelError


def nce(system, ratio, degree):
    dim = system.data.shape[1]
    grid, weights = normal_grid(dim, degree)
    at = LOC[:dim] + SCALE[:dim] * grid

    def loss(p):
        shift = p["log_normalizer"] + np.log(ratio)
        here = jax.vmap(lambda v: log_ratio(system, p, v))(jnp.asarray(system.data)) - shift
        there = jax.vmap(lambda v: log_ratio(system, p, v))(jnp.asarray(at)) - shift
        return jnp.mean(softplus(-here)) + ratio * weights @ softplus(there)

    return loss


SYSTEMS = {
    "Exact": (ebm.Exact, oracles.gaussian_system),
    "Enumerated": (ebm.Enumerated, oracles.grbm_system),
    "bound": (
        partial(ebm.ImportanceBound, 3),
        lambda: oracles.with_learned_guide(oracles.grbm_system()),
    ),
    "bound, continuous": (
        partial(ebm.ImportanceBound, 2),
        lambda: oracles.with_learned_guide(oracles.linear_system()),
    ),
}


def self_normalized(system, degree):
    dim = system.data.shape[1]
    grid, weights = normal_grid(dim, degree)
    at = jnp.asarray(LOC[:dim] + SCALE[:dim] * grid)

    def loss(p):
        here = jax.vmap(lambda v: system.log_density(p, v))(jnp.asarray(system.data))
        there = jax.vmap(lambda v: log_ratio(system, p, v))(at)
        b = p["log_normalizer"]
        return b - jnp.mean(here) + jnp.exp(-b) * (weights @ jnp.exp(there)) - 1.0

    return loss


def formula(name, system, degree):
    if name.startswith("SNL"):
        return self_normalized(system, degree)
    if name.startswith("NCE"):
        return nce(system, int(name[-1]), degree)
    formulas = {"ranking": ranking, "conditional": conditional, "ratios": ratios}
    return formulas[name](system, degree)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("name", "marginal"),
    [
        slow("NCE 1", "Exact"),
        ("NCE 3", "Exact"),
        slow("NCE 1", "Enumerated"),
        ("NCE 3", "Enumerated"),
        slow("NCE 1", "bound"),
        slow("NCE 3", "bound"),  # the next test has a bound of a GRBM, too
        ("NCE 1", "bound, continuous"),
        slow("NCE 3", "bound, continuous"),
        slow("SNL 3", "Exact"),
        slow("SNL 1", "Enumerated"),
        slow("SNL 3", "bound"),
        slow("ranking", "Exact"),
        ("ranking", "Enumerated"),
        slow("conditional", "Exact"),
        ("conditional", "Enumerated"),
        slow("ratios", "Exact"),
        slow("ratios", "Enumerated"),
    ],
)
def test_value_and_gradient_are_unbiased(name, marginal):
    """All parameters at once; the guide has no part in the energy's loss."""
    make_marginal, system = SYSTEMS[marginal]
    system = system()
    dim = system.data.shape[1]
    objective = make(name, make_marginal(), dim)
    params = dict(system.params)
    if name.startswith(("NCE", "SNL")):
        params["log_normalizer"] = np.array(0.8)
    params, data = arrays(params), jnp.asarray(system.data)
    degree = 30 if dim == 2 else 14
    expected = np.asarray(jit(value_and_gradient(formula(name, system, degree)))(params))
    fewer = np.asarray(jit(value_and_gradient(formula(name, system, degree - 4)))(params))
    np.testing.assert_allclose(expected, fewer, atol=1e-3)  # the oracle is exact enough

    def one(rng_key):
        key_prepare, key_loss = jax.random.split(rng_key)
        problem = objective.prepare(key_prepare, params, system.model, system.guide, (data,), {})
        loss = partial(objective.energy_loss, key_loss)
        return jax.value_and_grad(lambda p: loss(p, problem))(params)

    assert_unbiased(draws(one, KEY, 4_000), expected, f"{name}, {marginal}")


@pytest.mark.usefixtures("x64")
def test_the_loss_is_the_energys_and_its_gradient_the_guides_as_well():
    system = oracles.with_learned_guide(oracles.grbm_system())
    objective = make("NCE 1", ebm.ImportanceBound(3), 2)
    params = arrays({**system.params, "log_normalizer": np.array(0.8)})
    expected = np.asarray(jit(value_and_gradient(nce(system, 1, 30)))(params))
    other = {**params, "A": params["A"] + 0.5}

    def one(params):
        def of(rng_key):
            loss = lambda p: objective.loss(  # noqa: E731
                rng_key, p, system.model, system.guide, jnp.asarray(system.data)
            )
            value, gradient = jax.value_and_grad(loss)(params)
            own = jnp.concatenate([gradient.pop("A").ravel(), gradient.pop("d").ravel()])
            return flat((value, gradient)), own

        return of

    energy, own = jax.tree.map(np.asarray, jit(jax.vmap(one(params)))(jax.random.split(KEY, 2_000)))
    names = [name for name in sorted(params) if name not in ("A", "d")]
    gradient = jit(jax.grad(nce(system, 1, 30)))(params)
    expected = np.concatenate([expected[:1], *(np.ravel(gradient[name]) for name in names)])
    assert_unbiased(energy, expected, "energy")
    # The guide is at the posterior, where the gradient of its own loss vanishes draw by draw.
    np.testing.assert_allclose(own, 0.0, atol=1e-9)
    _, own = jit(jax.vmap(one(other)))(jax.random.split(KEY, 4))
    assert np.all(np.max(np.abs(own), -1) > 1e-3)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("name", "marginal"),
    [
        ("NCE 3", "Exact"),
        slow("NCE 1", "Enumerated"),
        slow("NCE 1", "bound"),
        slow("SNL 3", "Exact"),
        ("ranking", "Exact"),
        ("conditional", "Exact"),
        slow("conditional", "Enumerated"),
        slow("ratios", "Exact"),
    ],
)
def test_the_truth_is_a_stationary_point(name, marginal):
    make_marginal, system = SYSTEMS[marginal]
    system = system()
    objective = make(name, make_marginal(), 2)
    truth = dict(system.params)
    if marginal == "Exact":
        data, log_z = gaussian_draws(40_000), gaussian_log_z(truth)
    else:
        data, log_z = oracles.grbm_draws(truth, 40_000, RNG), grbm_log_z(truth)
    if name.startswith(("NCE", "SNL")):
        truth["log_normalizer"] = log_z
    names = sorted(truth.keys() - {"A", "d"})
    batches = jnp.asarray(data).reshape(200, -1, 2)

    @jit
    def gradients(params):
        def one(rng_key, data):
            problem = objective.prepare(KEY, params, system.model, system.guide, (data,), {})
            loss = lambda p: objective.energy_loss(rng_key, {**params, **p}, problem)  # noqa: E731
            return flat(jax.grad(loss)({name: params[name] for name in names}))

        return jax.vmap(one)(jax.random.split(KEY, 200), batches)

    at_truth = np.asarray(gradients(arrays(truth)))
    assert_unbiased(at_truth, np.zeros(at_truth.shape[1]), f"{name}, {marginal}")
    # It is a test: somewhere else the gradient is not zero.
    first = "precision" if marginal == "Exact" else "W"
    for moved in names if name.startswith(("NCE", "SNL")) else [first]:
        shift = 0.2 if moved == "log_normalizer" else 0.15 * np.ones(np.shape(truth[moved]))
        away = np.asarray(gradients(arrays({**truth, moved: truth[moved] + shift})))
        assert np.max(np.abs(z_scores(away, 0.0 * away[0]))) > 8, moved


def with_own_log_z(data):
    numpyro.param("log_normalizer", 0.0)
    one_dimensional(data)


def test_numpyros_svi():
    data = 0.3 + 0.8 * jax.random.normal(KEY, (2_000,))
    objective = ebm.NCE(dist.Normal(0.0, 1.5), 2)
    optim = numpyro.optim.Adam(0.02)
    with pytest.raises(ModelError, match="'log_normalizer' of its own.*`numpyro_ebm.EnergySVI`"):
        SVI(one_dimensional, None, optim, objective).run(KEY, 1, data, progress_bar=False)
    svi = SVI(with_own_log_z, None, optim, objective)
    fit = svi.run(KEY, 1_000, data, progress_bar=False).params
    np.testing.assert_allclose(fit["t"], 1 / 0.8**2, rtol=0.15)
    exact = 0.5 * np.log(2 * np.pi / fit["t"]) + 0.5 * fit["m"] ** 2 / fit["t"]
    np.testing.assert_allclose(fit["log_normalizer"], exact, atol=0.06)
    # EnergySVI starts a declared log Z where the model says.
    svi = ebm.EnergySVI(with_own_log_z, None, optim, objective)
    assert svi.get_params(svi.init(KEY, data))["log_normalizer"] == 0.0


@pytest.mark.usefixtures("x64")
def test_log_z_starts_at_its_importance_estimate():
    data = jax.random.normal(KEY, (20_000,))
    svi = ebm.EnergySVI(one_dimensional, None, optax.adam(0.1), ebm.NCE(dist.Normal(0.0, 1.5)))
    start = svi.get_params(svi.init(KEY, data))["log_normalizer"]
    np.testing.assert_allclose(start, 0.5 * np.log(2 * np.pi), atol=0.03)
    given = svi.get_params(svi.init(KEY, data, init_params={"log_normalizer": 0.3}))
    assert given["log_normalizer"] == pytest.approx(0.3)


@pytest.mark.parametrize(
    "objective",
    [
        ebm.RankingNCE(dist.Normal(0.0, 1.5), 5),
        ebm.ConditionalNCE(0.8, 3),
        ebm.KernelRatioMatching(0.8, 3),
    ],
    ids=["ranking", "conditional", "ratios"],
)
@pytest.mark.slow
def test_the_others_train(objective):
    data = 0.3 + 0.8 * jax.random.normal(KEY, (2_000,))
    fit = train(one_dimensional, objective, data, 300, batch_size=500)
    assert set(fit.params) == {"m", "t"}
    np.testing.assert_allclose(fit.params["t"] * jnp.var(data), 1, rtol=0.15)
    np.testing.assert_allclose(fit.params["m"] / fit.params["t"], jnp.mean(data), atol=0.08)


@pytest.mark.slow
def test_variational_nce_trains():
    """With a guide that is learned beside it, log Z is still right: the bound is nearly tight."""
    data = jnp.asarray(oracles.grbm_draws(oracles.GRBM, 2_000, RNG), jnp.float32)
    noise = dist.Normal(jnp.mean(data, 0), 1.2 * jnp.std(data, 0)).to_event(1)
    objective = ebm.NCE(noise, 2, ebm.ImportanceBound(5))
    model = partial(oracles.grbm, num_visible=2)
    fit = train(model, objective, data, 2_000, guide=oracles.learned_grbm_guide)
    assert abs(fit.params["log_normalizer"] - grbm_log_z(fit.params)) < 0.15
    np.testing.assert_allclose(fit.params["A"], fit.params["W"], atol=0.3)


def test_repr():
    text = repr(ebm.RankingNCE(dist.Normal(0, 1), 4))
    assert text.startswith("RankingNCE(") and "noise_ratio=4" in text and "marginal=None" in text
