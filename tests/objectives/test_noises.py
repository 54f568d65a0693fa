# SPDX-License-Identifier: Apache-2.0
"""The ways to write a noise, with parameters of its own and under covariates."""

import itertools

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
    STEP,
    X,
    Y,
    arrays,
    bits,
    fitted_noise,
    log_normal,
    noise_of,
    normal_grid,
    one_dimensional,
    train,
    two_sites,
    value_and_gradient,
)
from jax.nn import softplus
from jax.scipy.special import gammaln
from oracles import assert_unbiased, draws, jit
from scipy.special import roots_genlaguerre

import numpyro_ebm as ebm
from numpyro_ebm.errors import ModelError
from numpyro_ebm.model.noise import Noise
from numpyro_ebm.model.reading import read_model

PROBS = np.array([0.3, 0.6])


def noise_x():
    return dist.Normal(0.4, 1.6)


def noise_y():
    return dist.Bernoulli(PROBS).to_event(1)


def no_arguments():
    return {"x": noise_x(), "y": noise_y()}


def models_arguments(x, y, shift=0.0):
    return {"x": dist.Normal(0.4 + shift, 1.6), "y": noise_y()}


def samples_in_the_plate(x, y, shift=0.0):
    with numpyro.plate("data", len(x)):
        numpyro.sample("x", noise_x())
        numpyro.sample("y", noise_y())


FORMS = {
    "dict": {"x": noise_x(), "y": noise_y()},
    "no arguments": no_arguments,
    "the model's arguments": models_arguments,
    "samples in the plate": samples_in_the_plate,
}


def two_sites_nce(p, ratio):
    """x by quadrature, y by enumeration."""
    grid, weights = normal_grid(1, 40)
    at_x = 0.4 + 1.6 * grid[:, 0]
    states = np.array(list(itertools.product([0, 1], repeat=2)))
    chance = np.prod(np.where(states == 1, PROBS, 1 - PROBS), -1)

    def G(x, y):
        log_p = -0.5 * p["w"] * (x - y.sum(-1)) ** 2 + y @ p["b"]
        log_q = log_normal(x[..., None], 0.4, 1.6)
        log_q = log_q + y @ np.log(PROBS) + (1 - y) @ np.log1p(-PROBS)
        return log_p - p["log_normalizer"] - np.log(ratio) - log_q

    noise = sum(
        c * weights @ softplus(G(at_x, np.broadcast_to(y, (len(at_x), 2))))
        for c, y in zip(chance, states, strict=True)
    )
    return jnp.mean(softplus(-G(jnp.asarray(X), Y))) + ratio * noise


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_noise_over_two_sites(form):
    """A real and a discrete site; the mean is the formula, the density the same to the last bit."""
    params = arrays({"w": 0.7, "b": np.array([0.3, -0.4]), "log_normalizer": 1.1})
    args = (jnp.asarray(X), jnp.asarray(Y))
    row_model = read_model(two_sites, args)
    points = row_model.unconstrain_visible()
    log_q = Noise(FORMS[form], row_model).log_density({}, points)
    reference = Noise(FORMS["dict"], row_model).log_density({}, points)
    np.testing.assert_array_equal(log_q, reference)
    by_hand = log_normal(X[:, None], 0.4, 1.6) + Y @ np.log(PROBS) + (1 - Y) @ np.log1p(-PROBS)
    np.testing.assert_allclose(log_q, by_hand, rtol=1e-12)
    objective = ebm.NCE(FORMS[form], 2)

    def loss(rng_key, form=form):
        problem = objective.prepare(KEY, params, two_sites, None, args, {})
        return jax.value_and_grad(lambda p: objective.energy_loss(rng_key, p, problem))(params)

    expected = jit(value_and_gradient(lambda p: two_sites_nce(p, 2)))(params)
    assert_unbiased(draws(loss, KEY, 3_000), expected, form)


def test_sites_have_noise_of_their_own():
    def model(data):
        with numpyro.plate("data", len(data)):
            sites = [numpyro.sample(name, ebm.Lebesgue(), obs=data) for name in "uvw"]
            ebm.energy("E", sum(x**2 for x in sites))

    noise = Noise(dict.fromkeys("uvw", dist.Normal(0.0, 1.0)), read_model(model, (jnp.zeros(4),)))
    drawn = noise.draw(KEY, {}, 2)
    assert len(np.unique(np.stack([drawn[name] for name in "uvw"]))) == 24


@pytest.mark.usefixtures("x64")
def test_a_noise_function_is_called_with_the_models_arguments():
    args, kwargs = (jnp.asarray(X), jnp.asarray(Y)), {"shift": 0.5}
    row_model = read_model(two_sites, args, kwargs)
    log_q = Noise(models_arguments, row_model).log_density({}, row_model.unconstrain_visible())
    moved = {"x": dist.Normal(0.9, 1.6), "y": noise_y()}
    expected = Noise(moved, row_model).log_density({}, row_model.unconstrain_visible())
    np.testing.assert_array_equal(log_q, expected)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("form", ["distribution", "dict", "function", "plate"])
def test_one_site_in_every_form(form):
    """Distributions and functions that return them draw alike, given the same key."""

    def plate(data):
        with numpyro.plate("data", len(data)):
            numpyro.sample("v", noise_of(2))

    forms = {
        "distribution": noise_of(2),
        "dict": {"v": noise_of(2)},
        "function": lambda: noise_of(2),
        "plate": plate,
    }
    system = oracles.gaussian_system()
    row_model = read_model(system.model, (jnp.asarray(system.data),))
    noise, reference = Noise(forms[form], row_model), Noise(noise_of(2), row_model)
    points = row_model.unconstrain_visible()
    np.testing.assert_array_equal(noise.log_density({}, points), reference.log_density({}, points))
    drawn = noise.draw(KEY, {}, 3_000)["v"]
    assert drawn.shape == (3_000, 4, 2)
    if form == "plate":
        samples = np.concatenate([drawn[:, 0], drawn[:, 0] ** 2], -1)
        moments = np.concatenate([LOC[:2], LOC[:2] ** 2 + SCALE[:2] ** 2])
        assert_unbiased(samples, moments, form)
        assert np.all(np.abs(np.corrcoef(drawn[:, 0, 0], drawn[:, 1, 0])[0, 1]) < 0.08)
    else:
        np.testing.assert_array_equal(drawn, reference.draw(KEY, {}, 3_000)["v"])


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("form", ["distribution", "plate"])
def test_positive_support(form):
    """Written in v itself, without a Jacobian: Gauss-Laguerre for Gamma noise."""
    system = oracles.gamma_system()
    shape, rate, ratio = 2.2, 0.9, 2
    nodes, weights = roots_genlaguerre(60, shape - 1)
    nodes, weights = nodes / rate, weights / weights.sum()

    def expected(p):
        def G(v):
            log_p = (p["a"] - 1) * jnp.log(v) - p["rate"] * v
            log_q = shape * np.log(rate) - gammaln(shape) + (shape - 1) * jnp.log(v) - rate * v
            return log_p - log_q - p["log_normalizer"] - np.log(ratio)

        data = jnp.mean(softplus(-G(jnp.asarray(system.data))))
        return data + ratio * weights @ softplus(G(nodes))

    def plate(data):
        with numpyro.plate("data", len(data)):
            numpyro.sample("v", dist.Gamma(shape, rate))

    noise = dist.Gamma(shape, rate) if form == "distribution" else plate
    params = arrays({**system.params, "log_normalizer": np.array(-0.4)})
    data = jnp.asarray(system.data)
    objective = ebm.NCE(noise, ratio)

    def one(rng_key):
        loss = lambda p: objective.loss(rng_key, p, system.model, None, data)  # noqa: E731
        return jax.value_and_grad(loss)(params)

    assert_unbiased(draws(one, KEY, 6_000), jit(value_and_gradient(expected))(params), form)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["NCE", "ranking"])
def test_discrete_visible_sites(name):
    states = np.array(list(itertools.product([0, 1], repeat=3)))
    probs = np.array([0.3, 0.5, 0.8])
    log_q = states @ np.log(probs) + (1 - states) @ np.log1p(-probs)
    params = arrays({"b": np.array([0.4, -0.3, 0.9]), "J": 0.8, "log_normalizer": 1.9})
    if name == "ranking":
        del params["log_normalizer"]
    rows = np.array([1, 6, 6, 3])

    def expected(p):
        at = states @ p["b"] + p["J"] * states[:, 0] * states[:, 1] - log_q
        if name == "ranking":
            return jnp.mean(softplus(at - at[rows][:, None]) @ np.exp(log_q))
        at = at - p["log_normalizer"]
        return jnp.mean(softplus(-at[rows])) + np.exp(log_q) @ softplus(at)

    noise = dist.Bernoulli(probs).to_event(1)
    objective = ebm.NCE(noise) if name == "NCE" else ebm.RankingNCE(noise, 1)
    data = jnp.asarray(states[rows])

    def one(rng_key):
        loss = lambda p: objective.loss(rng_key, p, bits, None, data)  # noqa: E731
        return jax.value_and_grad(loss)(params)

    assert_unbiased(draws(one, KEY, 4_000), jit(value_and_gradient(expected))(params), name)


@pytest.mark.slow
def test_a_noise_with_parameters_is_fitted_by_maximum_likelihood():
    data = 3.0 + 0.5 * jax.random.normal(KEY, (2_000,))
    objective = ebm.NCE(fitted_noise)
    fit = train(one_dimensional, objective, data, 800, lr=0.05, init_params={"m": 9.0, "t": 3.0})
    np.testing.assert_allclose(fit.params["loc"], jnp.mean(data), atol=1e-3)
    np.testing.assert_allclose(fit.params["noise_scale"], jnp.std(data), atol=1e-3)
    trained = objective.noise_distribution(fit.params, one_dimensional, data)
    assert (trained.loc, trained.scale) == (fit.params["loc"], fit.params["noise_scale"])


@pytest.mark.slow
def test_the_noise_has_an_optimiser_and_steps_of_its_own():
    data = 3.0 + 0.5 * jax.random.normal(KEY, (100,))
    still = ebm.NCE(fitted_noise, noise_optim=optax.sgd(0.0))
    fit = train(one_dimensional, still, data, 3, init_params={"m": 9.0, "t": 3.0})
    assert (fit.params["loc"], fit.params["noise_scale"]) == (0.0, pytest.approx(2.0))
    steps = [
        train(
            one_dimensional,
            ebm.NCE(fitted_noise, noise_optim=optax.sgd(0.1), num_noise_steps=num),
            data,
            rounds,
            init_params={"m": 9.0, "t": 3.0},
        ).params
        for num, rounds in [(3, 1), (1, 3)]
    ]
    np.testing.assert_allclose(steps[0]["loc"], steps[1]["loc"], rtol=1e-5)


@pytest.mark.usefixtures("x64")
def test_the_gradient_of_the_noise_is_that_of_its_likelihood_and_of_nothing_else():
    data = 1.0 + RNG.normal(size=6)
    objective = ebm.NCE(fitted_noise, 2)
    params = arrays({"t": 1.2, "m": 0.3, "log_normalizer": 0.8, "loc": 0.5, "noise_scale": 1.4})
    loss = lambda p: objective.loss(KEY, p, one_dimensional, None, jnp.asarray(data))  # noqa: E731
    value, gradient = jit(jax.value_and_grad(loss))(params)
    np.testing.assert_allclose(gradient["loc"], -np.mean(data - 0.5) / 1.4**2, rtol=1e-9)
    np.testing.assert_allclose(
        gradient["noise_scale"], np.mean(1 / 1.4 - (data - 0.5) ** 2 / 1.4**3), rtol=1e-9
    )
    fixed = ebm.NCE(dist.Normal(0.5, 1.4), 2)
    energy = {k: params[k] for k in ("t", "m", "log_normalizer")}
    loss = lambda p: fixed.loss(KEY, p, one_dimensional, None, jnp.asarray(data))  # noqa: E731
    expected, of_energy = jit(jax.value_and_grad(loss))(energy)
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    for name in energy:
        np.testing.assert_allclose(gradient[name], of_energy[name], rtol=1e-9)


def regression(x, data):
    """The normaliser of a row depends on its x."""
    w = numpyro.param("w", jnp.array(0.5))
    with numpyro.plate("data", len(x)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", 0.5 * jnp.exp(w * x) * v**2 - x * v)


def test_covariates_want_another_objective():
    x, data = jnp.linspace(-1, 1, 8), jnp.arange(8.0)
    with pytest.raises(ModelError, match="log Z of its own.*Use RankingNCE"):
        train_with = ebm.EnergySVI(regression, None, optax.adam(0.1), ebm.NCE(dist.Normal(0, 1)))
        train_with.run(KEY, 1, x, data, progress_bar=False)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["ranking", "conditional"])
def test_covariates(name):
    x, data = RNG.normal(size=4), RNG.normal(size=4)
    grid, weights = normal_grid(1, 40)
    objective = (
        ebm.RankingNCE(dist.Normal(0.1, 1.5), 1)
        if name == "ranking"
        else ebm.ConditionalNCE(STEP, 2)
    )

    def expected(p):
        def at(v):  # (..., rows)
            return -0.5 * jnp.exp(p["w"] * x) * v**2 + x * v

        if name == "ranking":
            log_q = lambda v: log_normal(v[..., None], 0.1, 1.5)  # noqa: E731
            draw = 0.1 + 1.5 * grid
            there, here = at(draw) - log_q(draw), at(data) - log_q(data)
        else:
            there, here = at(data + STEP * grid), at(data)
        return jnp.mean(weights @ softplus(there - here))

    params = {"w": jnp.array(0.5)}

    def one(rng_key):
        loss = lambda p: objective.loss(  # noqa: E731
            rng_key, p, regression, None, jnp.asarray(x), jnp.asarray(data)
        )
        return jax.value_and_grad(loss)(params)

    assert_unbiased(draws(one, KEY, 4_000), jit(value_and_gradient(expected))(params), name)
