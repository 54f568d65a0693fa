# SPDX-License-Identifier: Apache-2.0
"""Laws of the guide losses: their gradients, what they drive a guide to, and what they see."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import oracles
import pytest
from guide_cases import LINEAR_NAMES, SOMEWHERE, arrays, loss_of, minimise, negative_elbo, split
from numpyro.infer import Trace_ELBO, TraceGraph_ELBO
from oracles import assert_unbiased, draws, flat, jit
from scipy.stats import norm

import numpyro_ebm as ebm
from numpyro_ebm.guides.guide import Guide
from numpyro_ebm.guides.losses import row_guide_loss
from numpyro_ebm.model.reading import read_model

pytestmark = pytest.mark.usefixtures("x64")


def bare_system(model, guide, params, data):
    """A model without the closed forms of a system."""
    return oracles.System(model, guide, params, data, None, None, None)


def posterior_score(p, guide_params, v):
    """½ E‖-ε/s + P (m + s ε - μ)‖² with q = N(m, s²) and the posterior N(μ, P⁻¹)."""
    mean, precision = oracles.linear_posterior(p, v)
    std = guide_params["std"]
    shift = precision @ (guide_params["B"] @ v + guide_params["d"] - mean)
    return 0.5 * jnp.sum(shift**2) + 0.5 * jnp.sum((precision * std - jnp.diag(1 / std)) ** 2)


CONTINUOUS = {
    "PosteriorScore": (ebm.PosteriorScore(), posterior_score),
    "Trace_ELBO": (Trace_ELBO(), negative_elbo),
    "Trace_ELBO, particles": (Trace_ELBO(num_particles=3), negative_elbo),
}


# One instance of each guide loss of the library.
REGISTRY = {"RelaxedELBO": ebm.RelaxedELBO(), "PosteriorScore": ebm.PosteriorScore()}


def test_every_guide_loss_is_in_the_registry():
    exported = {x for x in vars(ebm).values() if isinstance(x, type) and hasattr(x, "rows")}
    assert {type(x) for x in REGISTRY.values()} == exported


def over_rows(row, system, weights=1.0):
    own, _ = split(system, LINEAR_NAMES)
    data = jnp.asarray(system.data)
    return lambda q: jnp.mean(weights * jax.vmap(lambda v: row(own, q, v))(data))


@pytest.mark.parametrize("name", CONTINUOUS)
@pytest.mark.parametrize("weights", [None, np.array([0.5, 2.0, 3.0, 0.1])])
def test_continuous_guide_losses_have_the_closed_form_gradient(name, weights):
    guide_loss, row = CONTINUOUS[name]
    system = oracles.with_learned_guide(oracles.linear_system())
    loss = loss_of(guide_loss, system, LINEAR_NAMES)
    where = arrays(SOMEWHERE)
    weights = None if weights is None else jnp.asarray(weights)
    formula = over_rows(row, system, 1.0 if weights is None else weights)
    expected = flat(jit(jax.value_and_grad(formula))(where))
    samples = draws(
        lambda key: jax.value_and_grad(lambda q: loss(key, q, weights))(where),
        jax.random.key(1),
        4_000,
    )
    assert_unbiased(samples, expected, f"{name}, {'plain' if weights is None else 'weighted'}")


@pytest.mark.parametrize("name", ["PosteriorScore", "Trace_ELBO"])
def test_continuous_guide_losses_drive_a_guide_to_the_posterior(name):
    guide_loss, _ = CONTINUOUS[name]
    system = oracles.with_learned_guide(oracles.linear_system(num_rows=50))
    _, exact = split(system, LINEAR_NAMES)
    loss = loss_of(guide_loss, system, LINEAR_NAMES)
    found = minimise(loss, arrays(SOMEWHERE), 2_000, 0.05)
    for key, value in exact.items():
        np.testing.assert_allclose(found[key], value, atol=0.03)


def test_posterior_score_vanishes_at_the_posterior_draw_by_draw():
    system = oracles.with_learned_guide(oracles.linear_system())
    _, exact = split(system, LINEAR_NAMES)
    loss = loss_of(ebm.PosteriorScore(), system, LINEAR_NAMES)
    samples = draws(
        lambda key: jax.value_and_grad(lambda q: loss(key, q))(exact), jax.random.key(0), 20
    )
    np.testing.assert_allclose(samples, 0.0, atol=1e-10)


def test_the_density_of_a_guide_is_that_of_all_its_sites():
    def model(data):
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            h, k = (numpyro.sample(name, ebm.Lebesgue((2,))) for name in "hk")
            ebm.energy("E", 0.5 * (v**2 + jnp.sum(h**2 + k**2, -1)))

    def guide(data):
        with numpyro.plate("data", len(data)):
            v = ebm.visible("v", data)[:, None]
            h = numpyro.sample("h", dist.Normal(v, jnp.array([1.0, 2.0])).to_event(1))
            numpyro.sample("k", dist.Normal(h - v, jnp.array([0.5, 3.0])).to_event(1))

    data = jnp.array([0.3, -1.2, 2.0])
    h, k = np.random.default_rng(3).normal(size=(2, 3, 2))
    row_model = read_model(model, (data,))
    reader = Guide(guide, row_model, (data,), {})
    found = reader.log_density({}, {"v": data}, {"h": jnp.asarray(h), "k": jnp.asarray(k)})
    v = np.asarray(data)[:, None]
    expected = norm.logpdf(h, v, [1.0, 2.0]) + norm.logpdf(k, h - v, [0.5, 3.0])
    np.testing.assert_allclose(found, expected.sum(-1), rtol=1e-5)


TABLE = np.array([[0.3, -0.2, 0.6], [-0.5, 0.4, 0.1]])


def categorical_model(data):
    T = numpyro.param("T", jnp.zeros((2, 3)))
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(event_shape=(2,)), obs=data)
        z = numpyro.sample("z", ebm.Counting(num_values=3))
        field = jnp.take_along_axis(v @ T, z[..., None], -1)[..., 0]
        ebm.energy("E", 0.5 * jnp.sum(v**2, -1) - field)


def categorical_guide(data):
    Q = numpyro.param("Q", jnp.zeros((2, 3)))
    with numpyro.plate("data", len(data)):
        v = ebm.visible("v", data)
        numpyro.sample("z", dist.Categorical(logits=v @ Q))


@pytest.mark.parametrize("weights", [None, np.array([0.5, 2.0, 3.0])])
def test_trace_graph_elbo_on_categorical_latents(weights):
    data = np.random.default_rng(5).normal(size=(3, 2))
    system = bare_system(categorical_model, categorical_guide, {"T": TABLE}, data)
    Q = jnp.asarray(0.5 * np.random.default_rng(6).normal(size=(2, 3)))
    weights = None if weights is None else jnp.asarray(weights)

    def formula(Q):
        log_q = jax.nn.log_softmax(jnp.asarray(data) @ Q, -1)
        log_p = jnp.asarray(data @ TABLE - 0.5 * np.sum(data**2, -1, keepdims=True))
        rows = jnp.sum(jnp.exp(log_q) * (log_q - log_p), -1)
        return jnp.mean(rows if weights is None else weights * rows)

    loss = loss_of(TraceGraph_ELBO(), system, ("T",))
    value, gradient = jax.value_and_grad(formula)(Q)
    samples = draws(
        lambda key: jax.value_and_grad(lambda Q: loss(key, {"Q": Q}, weights))(Q),
        jax.random.key(7),
        10_000,
    )
    # The value of TraceGraph_ELBO carries its score-function terms; its gradient is what is meant.
    assert_unbiased(samples[:, 1:], np.ravel(gradient), "TraceGraph_ELBO")


@pytest.mark.parametrize("loss, slope", [(Trace_ELBO(), -1.0), (ebm.PosteriorScore(), -2.0)])
def test_a_guide_is_fitted_at_the_values_of_the_problem(loss, slope):
    """And not at the data: of h given v, N(v/2, 1/2), and q = N(loc, 1) at the same noise."""

    def model(data):
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            h = numpyro.sample("h", ebm.Lebesgue())
            ebm.energy("E", 0.5 * (v - h) ** 2 + 0.5 * h**2)

    def guide(data):
        loc = numpyro.param("loc", 0.0)
        ebm.visible("v", data)
        with numpyro.plate("data", len(data)):
            numpyro.sample("h", dist.Normal(loc, 1.0))

    data, params = jnp.arange(4.0), {"loc": jnp.array(0.3)}
    objective = ebm.ScoreMatching(ebm.VaGES(3, importance_weighted=True))
    problem = objective.prepare(jax.random.key(2), params, model, guide, (data,), {})

    def gradient(v):
        moved = problem._replace(unconstrained={"v": v})
        fit = lambda own: row_guide_loss(loss, jax.random.key(3), {}, own, moved, guide)  # noqa: E731
        return jax.grad(fit)(params)["loc"]

    np.testing.assert_allclose(gradient(data + 2.0) - gradient(data), 2 * slope, rtol=1e-6)
