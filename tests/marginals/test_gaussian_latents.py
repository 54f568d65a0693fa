# SPDX-License-Identifier: Apache-2.0
"""Real latents integrated in closed form, against quadrature and the closed forms of Gaussians."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax.nn import logsumexp
from marginal_cases import gaussian_latents
from oracles import jit

import numpyro_ebm as ebm
from numpyro_ebm.marginals import exact_marginal
from numpyro_ebm.model.reading import read_model

pytestmark = pytest.mark.usefixtures("x64")

KEY = jax.random.key(0)
DATA = np.random.default_rng(0).normal(size=(4, 2))


def nested(log_density, params, v):
    """A row function, its score, its Hessian and the gradient of that, and all their gradients in
    the parameters."""

    def of_rows(p):
        score = jax.grad(lambda v: jnp.sum(log_density(p, v)))
        along = lambda v: jax.jvp(score, (v,), (jnp.ones_like(v),))[1]  # noqa: E731
        third = jax.grad(lambda v: jnp.sum(along(v)))
        return log_density(p, v), score(v), along(v), third(v)

    return of_rows(params), jax.jacfwd(of_rows)(params)


def assert_integral(model, log_joint, params, data, latents, tolerance=1e-8):
    """The default marginal against a sum over a grid of all latents of a row, to third order."""
    grid = [jnp.asarray(x) for x in zip(*itertools.product(*latents), strict=True)]
    weight = np.prod([x[1] - x[0] for x in latents if x.dtype.kind == "f"])

    def quadrature(p, v):
        return logsumexp(jax.vmap(lambda *h: log_joint(p, v, *h))(*grid), 0) + np.log(weight)

    of_library = gaussian_latents(model, params, data)
    found, exact = (
        jit(lambda p, v, f=f: nested(f, p, v))(params, jnp.asarray(data))
        for f in (of_library, quadrature)
    )
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


GRID = np.linspace(-20.0, 20.0, 321)  # spectrally accurate for Gaussians


def one_latent(data):
    """The posterior's precision depends on v, and v is not Gaussian."""
    a = numpyro.param("a", 0.7)
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue((2,)), obs=data)
        h = numpyro.sample("h", dist.Normal(0.3, 2.0))
        ebm.energy("E", one_energy(a, v, h))


def one_energy(a, v, h):
    return 0.5 * (a * v[:, 0] * h - jnp.sin(v[:, 1])) ** 2 + 0.1 * jnp.sum(v**4, -1)


def test_one_latent_against_quadrature():
    def log_joint(p, v, h):
        return dist.Normal(0.3, 2.0).log_prob(h) - one_energy(p["a"], v, h)

    assert_integral(one_latent, log_joint, {"a": jnp.asarray(0.7)}, DATA, [GRID])


def two_energy(coupling, v, g, h):
    cross = coupling * g * h[..., 0] * jnp.cos(v[:, 0])
    return 0.5 * (g - v[:, 1]) ** 2 + 0.8 * h[..., 0] ** 2 + cross + 0.3 * h[..., 0] * v[:, 0]


@pytest.mark.slow
def test_two_latent_sites_against_quadrature():
    """Coupled sites of different shapes, one with a flat base measure."""

    def model(data):
        coupling = numpyro.param("a", 0.4)
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue((2,)), obs=data)
            g = numpyro.sample("g", ebm.Lebesgue())
            h = numpyro.sample("h", dist.Normal(0.5, 1.5).expand([1]).to_event(1))
            ebm.energy("E", two_energy(coupling, v, g, h))

    def log_joint(p, v, g, h):
        return dist.Normal(0.5, 1.5).log_prob(h) - two_energy(p["a"], v, g, h[None])

    assert_integral(model, log_joint, {"a": jnp.asarray(0.4)}, DATA, [GRID[::2], GRID[::2]])


def test_discrete_latents_beside_real_ones_against_quadrature():
    """Spike and slab: a switch, a level and a width of h, which all change its precision."""

    def energy(a, v, switch, level, h):
        width = 1.0 + 0.5 * level
        return 0.5 * width * h**2 - a * switch * h * v[:, 0] + 0.2 * level * v[:, 1] ** 2

    def model(data):
        a = numpyro.param("a", 0.8)
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue((2,)), obs=data)
            switch = numpyro.sample("switch", ebm.Counting(2, (1,)))
            level = numpyro.sample("level", dist.Categorical(probs=jnp.array([0.2, 0.3, 0.5])))
            h = numpyro.sample("h", ebm.Lebesgue())
            ebm.energy("E", 0.5 * jnp.sum(v**2, -1) + energy(a, v, switch[:, 0], level, h))

    def log_joint(p, v, switch, level, h):
        bowl = 0.5 * jnp.sum(v**2, -1) - jnp.log(jnp.array([0.2, 0.3, 0.5]))[level]
        return -bowl - energy(p["a"], v, switch, level, h)

    latents = [np.arange(2), np.arange(3), GRID]
    assert_integral(model, log_joint, {"a": jnp.asarray(0.8)}, DATA, latents)
    row_model = read_model(model, (jnp.asarray(DATA),), {}, {"a": 0.8})
    assert exact_marginal(row_model).num_states(row_model) == 6


@pytest.mark.slow
def test_a_hidden_plate_and_a_prior_with_a_covariance():
    cov = jnp.array([[1.0, 0.4], [0.4, 0.7]])
    W = jnp.array([0.5, -1.0, 0.3])

    def model(data):
        with numpyro.plate("data", len(data), dim=-1):
            v = numpyro.sample("v", ebm.Lebesgue((2,)), obs=data)
            z = numpyro.sample("z", dist.MultivariateNormal(jnp.ones(2), cov))
            ebm.energy("E", 0.5 * jnp.sum((v - z) ** 2, -1))
            with numpyro.plate("units", 3, dim=-2):
                h = numpyro.sample("h", dist.Normal(0.0, 1.0))
                ebm.energy("E_h", -W[:, None] * h * v[:, 0])

    exact = dist.MultivariateNormal(jnp.ones(2), cov + jnp.eye(2)).log_prob(DATA)
    exact = exact + np.log(2 * np.pi) + 0.5 * np.sum(W**2) * DATA[:, 0] ** 2
    found = gaussian_latents(model, {}, DATA)({}, jnp.asarray(DATA))
    np.testing.assert_allclose(found, exact, rtol=1e-10)


# Factor analysis


class Factor:
    """200 rows with covariates: v = W h + B x + noise of four variances, two factors."""

    rng = np.random.default_rng(1)
    W, B = rng.normal(size=(4, 2)), rng.normal(size=(4, 3))
    scale = np.array([0.5, 0.8, 1.0, 1.3])
    x = rng.normal(size=(200, 3))
    data = jnp.asarray(x @ B.T + rng.normal(size=(200, 2)) @ W.T + rng.normal(size=(200, 4)))
    log_z = np.sum(np.log(scale)) + 2 * np.log(2 * np.pi)

    @staticmethod
    def model(data=None):
        """The covariates stand in a closure."""
        with numpyro.plate("data", 200):
            v = numpyro.sample("v", ebm.Lebesgue((4,)), obs=data)
            h = numpyro.sample("h", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            residual = v - h @ Factor.W.T - Factor.x @ Factor.B.T
            ebm.energy("E", 0.5 * jnp.sum((residual / Factor.scale) ** 2, -1))

    @staticmethod
    def law():
        cov = Factor.W @ Factor.W.T + np.diag(Factor.scale**2)
        return dist.MultivariateNormal(Factor.x @ Factor.B.T, cov)

    @staticmethod
    def posterior():
        precision = np.eye(2) + (Factor.W.T / Factor.scale**2) @ Factor.W
        residual = (Factor.data - Factor.x @ Factor.B.T) / Factor.scale**2
        return np.linalg.solve(precision, Factor.W.T @ residual.T).T, np.linalg.inv(precision)


@pytest.mark.slow
def test_factor_analysis_log_likelihood():
    model = ebm.fixed(Factor.model, {})
    exact = Factor.law().log_prob(Factor.data)
    # Covariates move the law of a row, and its log Z happens to stay.
    options = {"log_normalizer": jnp.full(200, Factor.log_z), "with_error": True}
    found = ebm.log_likelihood(KEY, model, Factor.data, **options)
    np.testing.assert_allclose(found.value, exact, rtol=1e-10)
    np.testing.assert_array_equal(found.mcse, 0.0)
    found = ebm.log_likelihood(KEY, model, Factor.data)
    np.testing.assert_allclose(found, exact, rtol=1e-8)
    np.testing.assert_allclose(ebm.log_normalizer(KEY, model).value, Factor.log_z, rtol=1e-8)


def test_exact_draws_of_the_posterior():
    row_model = read_model(ebm.fixed(Factor.model, {}), (Factor.data,))
    num = 2_000
    values = {"v": jnp.broadcast_to(Factor.data, (num, 200, 4))}
    draw = jit(lambda: exact_marginal(row_model).draw(KEY, row_model, {}, values, num))
    h = np.asarray(draw()["h"])
    mean, cov = Factor.posterior()
    assert h.shape == (num, 200, 2)
    z = (h.mean(0) - mean) / np.sqrt(np.diag(cov) / num)
    assert np.abs(z).max() < 4.5 and abs(z.std() - 1) < 0.15
    centred = (h - mean).reshape(-1, 2)
    np.testing.assert_allclose(centred.T @ centred / len(centred), cov, atol=0.01)


def test_single_precision_far_from_zero():
    """The log-density at h = 0 has no digits left of what matters."""

    def model(data):
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            h = numpyro.sample("h", dist.Normal(1_000.0, 0.1))
            ebm.energy("E", 0.5 * (v - h) ** 2)

    data = 1_000.0 + jnp.linspace(-2.0, 2.0, 5)
    exact = dist.Normal(1_000.0, np.sqrt(1.01)).log_prob(data) + 0.5 * np.log(2 * np.pi)
    with jax.enable_x64(False):
        data = jnp.asarray(data, "float32")
        found = gaussian_latents(model, {}, data)({}, data)
        assert found.dtype == "float32"
    np.testing.assert_allclose(found, exact, atol=1e-3)
