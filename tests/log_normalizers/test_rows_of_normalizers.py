# SPDX-License-Identifier: Apache-2.0
"""Rows with a log Z of their own, and log-likelihoods."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from normalizer_cases import KEY, assert_covers

import numpyro_ebm as ebm
from numpyro_ebm.errors import ModelError
from numpyro_ebm.log_normalizers import LogNormalizer, likelihood

X = np.array([0.5, -1.0, 2.0, 0.0], np.float32)


def conditional(x, data=None, *, kind="abs"):
    """Covariates give every row a normalizer of its own."""
    with numpyro.plate("data", len(x)):
        v = numpyro.sample("v", ebm.Lebesgue((3,)), obs=data)
        size = jnp.abs(v) if kind == "abs" else 0.5 * v**2
        ebm.energy("E", jnp.exp(x) * jnp.sum(size, -1))


def test_rows_with_covariates_have_a_log_z_each():
    model = ebm.fixed(conditional, {})
    exact = 1.5 * np.log(2 * np.pi) - 1.5 * X
    found = ebm.log_normalizer(KEY, model, X, kind="square", method="enumerate")
    assert found.value.shape == found.mcse.shape == found.ess.shape == (4,)
    np.testing.assert_allclose(found.value, exact, rtol=1e-5)


@pytest.mark.slow
def test_rows_are_annealed_side_by_side():
    model, data = ebm.fixed(conditional, {}), np.ones((4, 3), np.float32)
    found = ebm.log_normalizer(KEY, model, X, data)
    assert found.method == "ais"
    assert found.value.shape == found.mcse.shape == found.ess.shape == (4,)
    assert_covers(found, 3 * np.log(2) - 3 * X)


def test_an_array_the_model_closes_over_makes_rows_differ_too():
    x = jnp.asarray(X)

    def closed(data=None):
        with numpyro.plate("data", 4):
            h = numpyro.sample("h", ebm.Counting(2, (2,)), obs=data)  # as many states as rows
            ebm.energy("E", -x * jnp.sum(h, -1) - 0.5 * h[:, 0] * h[:, 1])

    found = ebm.log_normalizer(KEY, ebm.fixed(closed, {}))
    a, b = np.indices((2, 2)).reshape(2, 4, 1)
    exact = np.logaddexp.reduce(X * (a + b) + 0.5 * a * b)
    np.testing.assert_allclose(found.value, exact, rtol=1e-5)
    found = jax.jit(lambda key: ebm.log_normalizer(key, ebm.fixed(closed, {})).value)(KEY)
    np.testing.assert_allclose(found, exact, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["quadrature", "smc"])
def test_every_method_knows_rows(method):
    def line(x, data=None):
        with numpyro.plate("data", len(x)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            ebm.energy("E", jnp.abs(v - x) * jnp.exp(x))

    found = ebm.log_normalizer(KEY, ebm.fixed(line, {}), X, method=method)
    assert found.value.shape == (4,)
    assert_covers(found, np.log(2) - X)


def test_errors_of_latents_and_of_log_z_add_in_squares(monkeypatch):
    """Where latents have no exact sum, the error of its estimate is that of a row."""

    def model(data):
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            h = numpyro.sample("h", ebm.Lebesgue())
            ebm.energy("E", 0.5 * v**2 + h**4 + v * h)

    estimate = LogNormalizer(jnp.array([1.0, 2.0]), jnp.array([0.3, 1.2]), math.inf, "annealed")
    monkeypatch.setattr(likelihood, "run_method", lambda *_: estimate)
    log_z = LogNormalizer(0.5, 0.4, math.inf, "given")
    data = np.array([0.1, -0.2], np.float32)
    found = ebm.log_likelihood(
        KEY, ebm.fixed(model, {}), data, log_normalizer=log_z, with_error=True
    )
    np.testing.assert_allclose(found.value, [0.5, 1.5], rtol=1e-6)
    np.testing.assert_allclose(found.mcse, [0.5, 1.6**0.5], rtol=1e-6)


def test_many_rows_of_data_do_not_change_it(grbm):
    params = {k: jnp.asarray(x, jnp.float32) for k, x in grbm.params.items()}
    model = ebm.fixed(grbm.model, params)
    few, many = (ebm.log_normalizer(KEY, model, np.zeros((n, 2))) for n in (1, 1_000))
    assert few.value == many.value and many.value.shape == ()


def test_log_likelihood_of_rows(grbm):
    params = {k: jnp.asarray(x, jnp.float32) for k, x in grbm.params.items()}
    exact = ebm.models.grbm_log_likelihood(params, jnp.asarray(grbm.data, jnp.float32))
    for model in (grbm.model, grbm.plate_model):
        fixed = ebm.fixed(model, params)
        found = ebm.log_likelihood(KEY, fixed, grbm.data)
        assert isinstance(found, jax.Array) and found.shape == (5,)
        np.testing.assert_allclose(found, exact, rtol=1e-5)
    log_z = ebm.log_normalizer(KEY, fixed, grbm.data)
    for given in (log_z, log_z.value, float(log_z.value), np.full(5, log_z.value)):
        found = ebm.log_likelihood(KEY, fixed, grbm.data, log_normalizer=given)
        np.testing.assert_allclose(found, exact, rtol=1e-5)
    found = ebm.log_likelihood(
        KEY, fixed, grbm.data, log_normalizer=log_z._replace(mcse=0.25), with_error=True
    )
    np.testing.assert_allclose(found.mcse, np.full(5, 0.25))
    with pytest.raises(ModelError, match="for each of the 5 rows"):
        ebm.log_likelihood(KEY, fixed, grbm.data, log_normalizer=jnp.zeros(3))


@pytest.mark.slow
def test_log_likelihood_integrates_continuous_latents_by_rows():
    def factor(data):
        with numpyro.plate("data", len(data)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
            v = numpyro.sample("v", ebm.Lebesgue((3,)), obs=data)
            ebm.energy("E", 0.5 * jnp.sum((v - z) ** 2, -1) + 0.0 * jnp.sum(z**4, -1))

    data = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    exact = dist.Normal(0, math.sqrt(2)).log_prob(data).sum(-1)
    log_z = 1.5 * math.log(2 * math.pi)
    found = ebm.log_likelihood(
        KEY, ebm.fixed(factor, {}), data, log_normalizer=log_z, with_error=True
    )
    assert np.all(found.mcse > 0)
    assert_covers(found, exact, 4.0)


def test_log_likelihood_of_covariates_wants_a_log_z_for_every_row():
    model = ebm.fixed(conditional, {})
    data = np.ones((4, 3), np.float32)
    with pytest.raises(ModelError, match="one log Z was given"):
        ebm.log_likelihood(KEY, model, X, data, kind="square", log_normalizer=1.0)
    found = ebm.log_likelihood(KEY, model, X, data, kind="square", method="enumerate")
    exact = dist.Normal(0, np.exp(-X / 2)[:, None]).log_prob(data).sum(-1)
    np.testing.assert_allclose(found, exact, rtol=1e-5)
