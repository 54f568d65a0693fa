# SPDX-License-Identifier: Apache-2.0
"""Exact and enumerated marginals against closed forms and brute force."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import oracles
import pytest
from jax.nn import logsumexp, sigmoid
from marginal_cases import DATA, W, bound, bowl, grbm_log_joint, lateral_in_a_plate
from numpyro.distributions import constraints
from oracles import jit

import numpyro_ebm as ebm
from numpyro_ebm.guides.guide import Guide
from numpyro_ebm.model.reading import read_model

pytestmark = pytest.mark.usefixtures("x64")


def derivatives(log_density, params, u):
    """Value, score, Hessian and their gradients in the parameters, row by row, of a row function.

    :param log_density: (params, (rows, D)) -> (rows,)
    """

    def of_rows(params):
        score = jax.grad(lambda u: jnp.sum(log_density(params, u)))
        hessian = jax.jacfwd(score)(u)  # (rows, D, rows, D), rows do not mix
        return {
            "value": log_density(params, u),
            "score": score(u),
            "hessian": jnp.einsum("ndne->nde", hessian.reshape(*u.shape, *u.shape)),
        }

    return of_rows(params), jax.jacfwd(of_rows)(params)


def columns(x):
    return x if jnp.ndim(x) == 2 else x[:, None]


SYSTEMS = {
    "gaussian": oracles.gaussian_system,
    "grbm": oracles.grbm_system,
    "linear Gaussian": oracles.linear_system,
    "gamma": oracles.gamma_system,
    "log-normal": oracles.log_normal_system,
    "beta": oracles.beta_system,
}


@pytest.mark.parametrize("name", SYSTEMS)
def test_oracles_agree_with_their_own_derivatives(name):
    system = SYSTEMS[name]()
    points = jnp.asarray(system.unconstrain(system.data))

    @jit
    def both(u):
        score = jax.grad(system.log_density, 1)(system.params, u)
        hessian = jax.hessian(system.log_density, 1)(system.params, u)
        trace = jnp.trace(jnp.reshape(hessian, (np.size(u), np.size(u))))
        own = system.score(system.params, u), system.trace(system.params, u)
        return (score, trace), own

    for u in points:
        (score, trace), own = both(u)
        np.testing.assert_allclose(own[0], score, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(own[1], trace, rtol=1e-10)


def brute(log_joint, *sites):
    """log Σ_h p̃(v, h) over all values of ``sites``, each (number of values, shape)."""
    grids = [
        [np.reshape(x, shape) for x in itertools.product(range(num), repeat=int(np.prod(shape)))]
        for num, shape in sites
    ]
    states = [jnp.asarray(np.stack(x)) for x in zip(*itertools.product(*grids), strict=True)]

    def log_density(params, rows):
        return logsumexp(jax.vmap(lambda *h: log_joint(params, rows, *h))(*states), 0)

    return log_density


def transposed(data):
    """The data plate to the left of the hidden one."""
    w = numpyro.param("w", jnp.zeros((2, 2)))
    with numpyro.plate("data", len(data), dim=-2):
        v = numpyro.sample("v", ebm.Lebesgue(event_shape=(2,)), obs=data[:, None])
        ebm.energy("bowl", bowl(v))
        with numpyro.plate("hidden", 2, dim=-1):
            h = numpyro.sample("h", ebm.Counting())
            ebm.energy("E", -h * jnp.sum(v * w.T, -1))


def three_values(data):
    w = numpyro.param("w", jnp.zeros((2, 2)))
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(event_shape=(2,)), obs=data)
        h = numpyro.sample("h", ebm.Counting(num_values=3, event_shape=(2,)))
        ebm.energy("E", bowl(v) - jnp.sum((v @ w) * h, -1) + 0.3 * h[..., 0] * h[..., 1])


def two_sites_mixed(data):
    """A site with event dimensions, a scalar one, and one in a plate; all of them coupled."""
    w = numpyro.param("w", jnp.zeros((2, 2)))
    with numpyro.plate("data", len(data), dim=-1):
        v = numpyro.sample("v", ebm.Lebesgue(event_shape=(2,)), obs=data)
        s = numpyro.sample("s", ebm.Counting(event_shape=(2,)))
        z = numpyro.sample("z", ebm.Counting(num_values=3))
        ebm.energy("E", bowl(v) - jnp.sum((v @ w) * s, -1) - 0.4 * z * (s[..., 0] - v[..., 1]))
        with numpyro.plate("hidden", 3, dim=-2):
            h = numpyro.sample("h", ebm.Counting())
            field = (v @ w)[..., 0] + 0.5 * z - jnp.array([[0.2], [0.9], [-0.6]])
            ebm.energy("E_h", -h * field)


def proper(data):
    """Normalised base measures: a chain of Categoricals, and Bernoullis in a plate and an event."""
    w = numpyro.param("w", jnp.zeros((2, 2)))
    first = numpyro.param("first", jnp.ones(3) / 3, constraint=constraints.simplex)
    step = jnp.array([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [0.25, 0.25, 0.5]])
    with numpyro.plate("data", len(data), dim=-1):
        v = numpyro.sample("v", ebm.Lebesgue(event_shape=(2,)), obs=data)
        z = numpyro.sample("z", dist.Categorical(first))
        y = numpyro.sample("y", dist.Categorical(step[z]))
        s = numpyro.sample("s", dist.Bernoulli(jnp.array([0.3, 0.6])).to_event(1))
        ebm.energy("E", bowl(v) - jnp.sum((v @ w) * s, -1) - v[..., 0] * y)
        with numpyro.plate("hidden", 2, dim=-2):
            h = numpyro.sample("h", dist.Bernoulli(sigmoid(0.5 * z - 0.2)))
            ebm.energy("E_h", -h * v[..., 1])


def proper_log_joint(p, v, z, y, s, h):
    step = jnp.array([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [0.25, 0.25, 0.5]])
    on = 1 / (1 + jnp.exp(0.2 - 0.5 * z))
    units = jnp.sum(jnp.log(jnp.where(s, jnp.array([0.3, 0.6]), jnp.array([0.7, 0.4]))))
    units = units + jnp.sum(jnp.log(jnp.where(h, on, 1 - on)))
    prior = jnp.log(p["first"][z]) + jnp.log(step[z, y]) + units
    return prior - bowl(v) + (v @ p["w"]) @ s + v[:, 0] * y + jnp.sum(h) * v[:, 1]


def mixed_log_joint(p, v, s, z, h):
    field = (v @ p["w"])[:, :1] + 0.5 * z - jnp.array([0.2, 0.9, -0.6])
    energy = bowl(v) - (v @ p["w"]) @ s - 0.4 * z * (s[0] - v[:, 1]) - field @ h
    return -energy


def three_log_joint(p, v, h):
    return (v @ p["w"]) @ h - bowl(v) - 0.3 * h[0] * h[1]


ENUMERATED = {
    "event dimensions": (oracles.grbm, oracles.GRBM, grbm_log_joint, (2, (3,))),
    "hidden plate": (oracles.grbm_plated, oracles.GRBM, grbm_log_joint, (2, (3,))),
    "data plate on the left": (
        transposed,
        {"w": W},
        lambda p, v, h: (v @ p["w"]) @ h - bowl(v),
        (2, (2,)),
    ),
    "three values": (three_values, {"w": W}, three_log_joint, (3, (2,))),
    "two sites and a plate": (
        two_sites_mixed,
        {"w": W},
        mixed_log_joint,
        (2, (2,)),
        (3, ()),
        (2, (3,)),
    ),
    "proper latents": (
        proper,
        {"w": W, "first": np.array([0.5, 0.3, 0.2])},
        proper_log_joint,
        (3, ()),
        (3, ()),
        (2, (2,)),
        (2, (2,)),
    ),
    "lateral couplings": (
        oracles.lateral,
        oracles.LATERAL,
        lambda p, v, h: grbm_log_joint(p, v, h) + h @ p["U"] @ h,
        (2, (4,)),
    ),
}


@pytest.mark.parametrize("name", ENUMERATED)
def test_enumerated_equals_brute_force(name):
    model, params, log_joint, *sites = ENUMERATED[name]
    expected = jit(partial(derivatives, brute(log_joint, *sites)))(params, jnp.asarray(DATA))

    @jit
    def library(params, data):
        row_model = read_model(model, (data,), {}, params)
        point = row_model.unconstrain_visible()
        estimate = ebm.Enumerated().bind(jax.random.key(0), row_model, None, params, point, order=3)
        shape = point["v"].shape
        log_density = lambda p, u: estimate.log_density(p, {"v": u.reshape(shape)})  # noqa: E731
        score = estimate.score(point)["v"].reshape(data.shape)
        return derivatives(log_density, params, data), score

    result, score = library(params, jnp.asarray(DATA))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-11), result, expected)
    np.testing.assert_allclose(score, expected[0]["score"], rtol=1e-9, atol=1e-11)


def test_enumerated_sums_a_hundred_units_of_a_plate():
    rng = np.random.default_rng(0)
    params = {
        "W": rng.normal(size=(2, 100)),
        "b": np.zeros(2),
        "c": rng.normal(size=100),
        "scale": np.ones(2),
    }
    model = partial(oracles.grbm_plated, num_hidden=100)
    system = oracles.grbm_system(params=params, model=model)
    estimate, point = bound(ebm.Enumerated(), system, None, params)
    value = jit(lambda: (estimate.log_density(params, point), estimate.score(point)["v"]))()
    over_rows = partial(jax.vmap, in_axes=(None, 0))
    np.testing.assert_allclose(
        value[0], over_rows(oracles.grbm_log_density)(params, point["v"]), rtol=1e-12
    )
    np.testing.assert_allclose(
        value[1], over_rows(oracles.grbm_score)(params, point["v"]), rtol=1e-10
    )


@pytest.mark.parametrize("name", ["gaussian", "gamma", "log-normal", "beta"])
def test_exact_equals_the_closed_form(name):
    system = SYSTEMS[name]()
    points = jnp.asarray(system.unconstrain(system.data))

    @jit
    def library(params, data):
        estimate, point = bound(ebm.Exact(), system, None, params, data=data)
        log_density = lambda p, u: estimate.log_density(p, {"v": u.reshape(data.shape)})  # noqa: E731
        return derivatives(log_density, params, columns(point["v"])), estimate.score(point)["v"]

    result, score = library(system.params, jnp.asarray(system.data))
    rows = jax.vmap(lambda p, u: system.log_density(p, u.reshape(points.shape[1:])), (None, 0))
    expected = jit(partial(derivatives, rows))(system.params, columns(points))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-11), result, expected)
    np.testing.assert_allclose(columns(score), expected[0]["score"], rtol=1e-9)


def continuous(data):
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        h = numpyro.sample("h", ebm.Lebesgue())
        ebm.energy("E", 0.5 * v**2 + 0.5 * (h - v) ** 2)


def event_in_a_plate(data):
    with numpyro.plate("data", len(data), dim=-2):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        with numpyro.plate("hidden", 2, dim=-1):
            h = numpyro.sample("h", ebm.Counting(event_shape=(2,)))
            ebm.energy("E", 0.5 * v**2 - jnp.prod(h, -1) * v)


@pytest.mark.parametrize(
    ("marginal", "model", "data", "message"),
    [
        (ebm.Enumerated(max_states=7), oracles.lateral, DATA, r"16 joint states.*max_states=7"),
        (ebm.Enumerated(), continuous, DATA[:, 0], r"continuous latent site 'h'.*VaGES"),
        (ebm.Enumerated(), oracles.gaussian, DATA, "use `Exact\\(\\)`"),
        (
            ebm.Enumerated(),
            event_in_a_plate,
            DATA[:, :1],
            "event dimensions inside a further plate",
        ),
        (ebm.Enumerated(), lateral_in_a_plate, DATA, r"'E' reads.*'h' outside.*'hidden'"),
        (ebm.Exact(), oracles.grbm, DATA, r"without latent sites.*'h'"),
        (ebm.VaGES(), oracles.gaussian, DATA, "use `Exact\\(\\)`"),
        (ebm.VaGES(), oracles.grbm, DATA, "VaGES needs a guide"),
        (ebm.ImportanceBound(), oracles.gaussian, DATA, "use `Exact\\(\\)`"),
        (ebm.ImportanceBound(), oracles.grbm, DATA, "ImportanceBound needs a guide.*'h'"),
        (ebm.Unrolled(), oracles.gaussian, DATA, "use `Exact\\(\\)`"),
        (ebm.Unrolled(), oracles.grbm, DATA, "Unrolled needs a guide.*'h'"),
    ],
)
def test_a_marginal_that_cannot_serve_says_what_to_use(marginal, model, data, message):
    row_model = read_model(model, (jnp.asarray(data),))
    with pytest.raises(ebm.ModelError, match=message):
        marginal.check(row_model, None, 2)


def test_vages_needs_two_particles_and_three_for_third_derivatives():
    for wrong in (1, 0, 2.5):
        with pytest.raises(ebm.ModelError, match="must be an integer of at least 2"):
            ebm.VaGES(wrong)
    with pytest.raises(ebm.ModelError, match="exclude each other"):
        ebm.VaGES(2, importance_weighted=True, refine=ebm.LangevinRefinement())
    system = oracles.grbm_system()
    row_model = read_model(system.model, (jnp.asarray(system.data),))
    guide = Guide(system.guide, row_model, (system.data,), {})
    with pytest.raises(ebm.ModelError, match=r"order 3.*num_particles=2.*VaGES\(num_particles=3\)"):
        ebm.VaGES(2).check(row_model, guide, 3)
