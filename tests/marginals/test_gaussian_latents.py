# SPDX-License-Identifier: Apache-2.0
"""Real latents integrated in closed form, against quadrature and the closed forms of Gaussians.

A model with latents is compared with the same model without them, its energy being minus the
logarithm of the integral: whatever the library says of the one it has to say of the other.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import oracles
import pytest
from conftest import assert_mean
from jax.nn import logsumexp
from numpyro.distributions import constraints
from numpyro.infer import MCMC
from numpyro.infer.util import log_density
from oracles import jit
from registry.objectives import OBJECTIVES

import numpyro_ebm as ebm
from numpyro_ebm.marginals import choose, exact_marginal
from numpyro_ebm.mcmc import choose_kernel
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


def library(model, params, data):
    """The row log-density of the marginal that is the default of a model."""
    data = jnp.asarray(data)
    row_model = read_model(model, (data,), {}, params)
    marginal = choose(row_model)
    assert isinstance(marginal, ebm.GaussianLatents)
    return lambda p, v: marginal.log_density(row_model, p, {"v": v})


def assert_integral(model, log_joint, params, data, latents, tolerance=1e-8):
    """The default marginal against a sum over a grid of all latents of a row, to third order."""
    grid = [jnp.asarray(x) for x in zip(*itertools.product(*latents), strict=True)]
    weight = np.prod([x[1] - x[0] for x in latents if x.dtype.kind == "f"])

    def quadrature(p, v):
        return logsumexp(jax.vmap(lambda *h: log_joint(p, v, *h))(*grid), 0) + np.log(weight)

    of_library = library(model, params, data)
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
    found = library(model, {}, DATA)({}, jnp.asarray(DATA))
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


def test_factor_analysis_log_likelihood():
    model = ebm.fixed(Factor.model, {})
    exact = Factor.law().log_prob(Factor.data)
    options = {"log_normalizer": Factor.log_z, "with_error": True}
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
        found = library(model, {}, data)({}, data)
        assert found.dtype == "float32"
    np.testing.assert_allclose(found, exact, atol=1e-3)


# With everything that asks for a marginal: the same model with and without its latent site


NOISE = 0.6


def with_latent(data):
    w = numpyro.param("precision", 0.9)
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        h = numpyro.sample("h", dist.Normal(0.0, 1.0))
        ebm.energy("E", 0.5 * ((v - w * h) / NOISE) ** 2)


def without_latent(data):
    w = numpyro.param("precision", 0.9)
    variance = w**2 + NOISE**2
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", 0.5 * v**2 / variance + 0.5 * jnp.log(variance / NOISE**2))


PAIR = {"precision": 0.9}
ROWS = np.random.default_rng(2).normal(size=12)


FAST = ("ScoreMatching", "NCE", "MaximumLikelihood")


@pytest.mark.parametrize(
    "name",
    [
        name if name in FAST else pytest.param(name, marks=pytest.mark.slow)
        for name, member in OBJECTIVES.items()
        if member.sites == "real" and name != "ContrastiveDivergence"  # whose chains move h as well
    ],
)
def test_every_objective_has_the_loss_of_the_model_without_latents(name):
    objective = OBJECTIVES[name].make()

    def all_params(model):
        problem = objective.prepare(KEY, PAIR, model, None, (ROWS,), {})
        own = dict(objective.own_parameters(KEY, PAIR, problem))
        for network in objective.networks:
            own |= network.parameters(KEY, problem)
        return {**PAIR, **{k: v[0] for k, v in own.items()}}

    params = all_params(without_latent)

    def of(model):
        loss = lambda p: objective.loss(KEY, p, model, None, ROWS)  # noqa: E731
        return jit(jax.value_and_grad(loss))(params)

    found, exact = of(with_latent), of(without_latent)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-7, atol=1e-9)


def test_stein_test_and_adequacy_are_those_of_the_model_without_latents():
    found, exact = (
        ebm.stein_test(KEY, ebm.fixed(model, PAIR), ROWS, num_bootstrap=200)
        for model in (with_latent, without_latent)
    )
    np.testing.assert_allclose(found.statistic, exact.statistic, rtol=1e-10)
    np.testing.assert_allclose(found.null, exact.null, rtol=1e-9)
    assert found.p_value == exact.p_value


def test_energy_svi_learns_without_a_guide():
    import optax

    data = 1.5 * jax.random.normal(KEY, (500,))
    svi = ebm.EnergySVI(with_latent, None, optax.adam(0.02), ebm.ScoreMatching())
    fit = svi.run(KEY, 600, data, progress_bar=False)
    exact = np.sqrt(np.mean(data**2) - NOISE**2)  # score matching of a Gaussian is its likelihood
    np.testing.assert_allclose(np.abs(fit.params["precision"]), exact, rtol=1e-4)


# Chains and log Z: a double well with Gaussian latents, some given the discrete ones


def well(num_rows=1, observed=None):
    """v moves between two wells; h is Gaussian given v, and bends with it."""
    with numpyro.plate("data", num_rows):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=observed)
        h = numpyro.sample("h", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        k = numpyro.sample("k", ebm.Counting(2, (1,)))[:, 0]
        ebm.energy("E", (v**2 - 1) ** 2 + 0.5 * jnp.sum((h - v[:, None]) ** 2, -1) * v**2 - k * v)


def well_log_density(v):
    """log ∫ dh Σ_k, up to nothing."""
    integral = -0.5 * v**4 / (1 + v**2) - 0.5 * np.log1p(v**2)
    return -((v**2 - 1) ** 2) + 3 * integral + np.logaddexp(0.0, v)


WELL = np.linspace(-6.0, 6.0, 4_001)
WELL_WEIGHTS = np.exp(well_log_density(WELL)) * (WELL[1] - WELL[0])


def test_log_z_integrates_gaussian_sites_before_the_quadrature():
    model = ebm.fixed(well, {})
    found = ebm.log_normalizer(KEY, model)
    assert found.method == "quadrature"
    np.testing.assert_allclose(found.value, np.log(WELL_WEIGHTS.sum()), rtol=1e-8)
    v = jnp.linspace(-2.0, 2.0, 5)
    found = ebm.log_likelihood(KEY, model, 5, v, log_normalizer=0.0)
    np.testing.assert_allclose(found, well_log_density(v), rtol=1e-9)


def test_chains_move_on_the_marginal_and_the_latents_are_drawn_exactly():
    model = ebm.fixed(well, {})
    kernel = choose_kernel(model, 2)
    assert isinstance(kernel, ebm.MALA)
    mcmc = MCMC(kernel, num_warmup=20, num_samples=5, progress_bar=False)
    mcmc.run(KEY, 2)
    assert set(mcmc.get_samples()) == {"v"}
    rows = np.asarray(ebm.to_arviz(mcmc)["sample_stats"]["row_energy"])[0]
    np.testing.assert_allclose(rows, -well_log_density(mcmc.get_samples()["v"]), rtol=1e-8)
    draws = ebm.sample(jax.random.key(1), model, 4_000, num_chains=100)
    assert draws["h"].shape == (4_000, 1, 3) and draws["k"].shape == (4_000, 1, 1)
    v, h = (np.asarray(draws[name])[:, 0].reshape(100, 40, -1) for name in "vh")
    weights = WELL_WEIGHTS / WELL_WEIGHTS.sum()
    assert_mean(v[..., 0], weights @ WELL)
    assert_mean(v[..., 0] ** 2, weights @ WELL**2)
    mean = v**3 / (1 + v**2)
    assert_mean(h - mean, 0.0)
    assert_mean((h - mean) ** 2 * (1 + v**2), 1.0)
    assert_mean((h - mean)[..., 0] * (h - mean)[..., 1], 0.0)


def test_draws_given_the_visible_values():
    v = jnp.array([-1.5, 0.5])
    draws = ebm.sample(KEY, ebm.fixed(well, {}), 2_000, 2, v, num_warmup=5, thinning=1)
    mean = np.asarray(v) ** 3 / (1 + np.asarray(v) ** 2)
    h = np.asarray(draws["h"]).reshape(100, 20, 2, 3)
    assert_mean(h - mean[:, None], 0.0)
    on = 1 / (1 + np.exp(-np.asarray(v)))
    assert_mean(np.asarray(draws["k"]).reshape(100, 20, 2) - on, 0.0)


def test_posterior_gap_has_the_marginal_in_closed_form():
    system = oracles.linear_system(num_rows=5)
    guide = oracles.linear_guide(noise=0.8, shift=0.2)
    std = oracles.exact_linear_guide()["std"]
    kl = np.sum(-np.log(0.8) + 0.5 * (0.8**2 + (0.2 / std) ** 2) - 0.5)
    model = ebm.fixed(oracles.linear_gaussian, system.params)
    gap = ebm.posterior_gap(KEY, model, guide, {}, jnp.asarray(system.data), num_particles=2_000)
    assert gap.method == "marginal"
    exact = [oracles.linear_log_density(system.params, v) for v in system.data]
    np.testing.assert_allclose(gap.log_marginal, exact, rtol=1e-9)
    assert np.all(np.abs(gap.kl - kl) < 4 * gap.kl_error)


# Posteriors of parameters


def bayesian(data):
    """θ is the precision of v given h: a Gamma prior and no closed form."""
    theta = numpyro.sample("theta", dist.Gamma(3.0, 2.0))
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        h = numpyro.sample("h", dist.Normal(0.0, 1.0))
        ebm.energy("E", 0.5 * theta * (v - h) ** 2)


def exact_bayesian(theta, data):
    prior = dist.Gamma(3.0, 2.0).log_prob(theta)
    return prior + dist.Normal(0.0, np.sqrt(1 + 1 / theta)).log_prob(data).sum()


@pytest.mark.parametrize("log_z", ["enumerate", "quadrature", "known"])
def test_normalized_integrates_the_latents_out_where_asked(log_z):
    if log_z == "known":
        log_z = lambda p: 0.5 * jnp.log(2 * jnp.pi / p["theta"])  # noqa: E731
    model = ebm.normalized(bayesian, log_z, marginal=ebm.GaussianLatents())
    for theta in (0.5, 2.0):
        found, model_trace = log_density(model, (ROWS,), {}, {"theta": jnp.asarray(theta)})
        assert "h" not in model_trace
        np.testing.assert_allclose(found, exact_bayesian(theta, ROWS), rtol=1e-8)


def test_generalized_and_exchange_integrate_the_latents_out():
    from numpyro_ebm.posteriors.exchange.target import ExchangeTarget

    def explicit(data):
        theta = numpyro.sample("theta", dist.Gamma(3.0, 2.0))
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            ebm.energy("E", 0.5 * v**2 / (1 + 1 / theta) + 0.5 * jnp.log(1 + theta))

    theta = {"theta": jnp.asarray(1.3)}
    found, exact = (
        log_density(ebm.generalized(model, ebm.ScoreMatching(), 0.7), (ROWS,), {}, theta)[0]
        for model in (bayesian, explicit)
    )
    np.testing.assert_allclose(found, exact, rtol=1e-9)
    found, exact = (
        ExchangeTarget(model, (ROWS,), {}).log_rows(theta, {"v": ROWS})
        for model in (bayesian, explicit)
    )
    np.testing.assert_allclose(found, exact, rtol=1e-9)


def test_normalized_keeps_the_latents_where_nothing_is_said():
    model = ebm.normalized(bayesian)
    h = 0.3 * ROWS
    exact = dist.Gamma(3.0, 2.0).log_prob(1.5) + dist.Normal(0.0, 1.0).log_prob(h).sum()
    exact += dist.Normal(h, np.sqrt(1 / 1.5)).log_prob(ROWS).sum()
    found, _ = log_density(model, (ROWS,), {}, {"theta": jnp.asarray(1.5), "h": h})
    np.testing.assert_allclose(found, exact, rtol=1e-8)
    with pytest.raises(ebm.ModelError, match="an exact one"):
        ebm.normalized(bayesian, marginal=ebm.VaGES())


# What is refused


def refused(energy, latent=ebm.Lebesgue, **options):
    def model(data):
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue((2,)), obs=data)
            h = numpyro.sample("h", latent())
            ebm.energy("E", 0.5 * jnp.sum(v**2, -1) + energy(v[:, 0], h))

    return read_model(model, (jnp.asarray(DATA),))


@jax.custom_jvp
def square(x):
    return x**2


square.defjvp(lambda x, t: (x[0] ** 2, 2.0 * x[0] * t[0]))


@pytest.mark.parametrize(
    ("energy", "latent", "message"),
    [
        (lambda v, h: h**2 + 0.0 * h**4, ebm.Lebesgue, "degree 4"),
        (lambda v, h: jnp.cosh(h), ebm.Lebesgue, "no polynomial"),
        (lambda v, h: jnp.where(h > 0, 1.0, 2.0) * h**2, ebm.Lebesgue, "no polynomial"),
        (lambda v, h: jnp.abs(h - v), ebm.Lebesgue, "no polynomial"),
        (lambda v, h: h**2 * h**v, ebm.Lebesgue, "no polynomial"),
        (lambda v, h: h * v, ebm.Lebesgue, "nothing holds them"),
        (lambda v, h: square(h), ebm.Lebesgue, "custom_jvp"),
        (lambda v, h: h**2, lambda: dist.StudentT(3.0), "no polynomial"),
        (lambda v, h: h**2, lambda: ebm.Lebesgue(support=constraints.positive), "'h'.*Positive"),
        (lambda v, h: h**2, dist.HalfNormal, "'h'"),
    ],
)
def test_what_is_not_proved_to_be_gaussian_is_refused(energy, latent, message):
    row_model = refused(energy, latent)
    with pytest.raises(ebm.ModelError, match=f"{message}.*VaGES"):
        ebm.GaussianLatents().check(row_model, None, 2)
    with pytest.raises(ebm.ModelError, match=f"No exact marginal.*'h'.*{message}"):
        exact_marginal(row_model)
    with pytest.raises(ebm.ModelError, match=r"marginal=VaGES.*guide"):
        choose(row_model)


def test_other_latents_are_refused_too():
    with pytest.raises(ebm.ModelError, match=r"real latent sites.*'h'"):
        grbm = read_model(oracles.grbm, (jnp.asarray(DATA),), {"num_hidden": 3})
        ebm.GaussianLatents().check(grbm, None, 2)
    with pytest.raises(ebm.ModelError, match="real latent sites"):
        ebm.GaussianLatents().check(read_model(without_latent, (ROWS,)), None, 2)

    def many(data):
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            s = numpyro.sample("s", ebm.Counting(2, (13,)))
            h = numpyro.sample("h", ebm.Lebesgue())
            ebm.energy("E", 0.5 * (v - h) ** 2 + h * jnp.sum(s, -1) * v)

    with pytest.raises(ebm.ModelError, match="8192 joint states.*max_states=4096"):
        exact_marginal(read_model(many, (ROWS,)))


def test_nothing_is_read_off_the_values_at_hand():
    """A power that happens to be two, and a coefficient that happens to be zero."""

    def model(data, by_power):
        power = numpyro.param("power", 2.0)
        quartic = numpyro.param("quartic", 0.0)
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            h = numpyro.sample("h", ebm.Lebesgue())
            energy = jnp.abs(h) ** power if by_power else h**2 + quartic * h**4
            ebm.energy("E", 0.5 * v**2 + energy)

    for by_power in (True, False):
        with pytest.raises(ebm.ModelError, match="No exact marginal"):
            exact_marginal(read_model(model, (ROWS, by_power)))


@pytest.mark.parametrize("correlated", [False, True])
def test_a_divergent_integral_is_nan(correlated):
    def model(data):
        curvature = numpyro.param("curvature", 1.0)
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            h = numpyro.sample("h", ebm.Lebesgue((2,)))
            cross = 0.5 * h[:, 0] * h[:, 1] if correlated else 0.0
            bends = h[:, 0] ** 2 + curvature * h[:, 1] ** 2 + cross
            ebm.energy("E", 0.5 * v**2 + bends - h[:, 0] * v)

    for curvature in (-1.0, 0.0):
        params = {"curvature": jnp.asarray(curvature)}
        assert np.all(np.isnan(library(model, params, ROWS)(params, ROWS)))
        with pytest.raises(ebm.ModelError, match="diverges"):
            ebm.log_likelihood(KEY, ebm.fixed(model, params), ROWS, log_normalizer=0.0)
