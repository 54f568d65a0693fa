# SPDX-License-Identifier: Apache-2.0
"""Laws of the marginals, over every member of the family, in double precision.

The exact ones equal closed forms and brute force; VaGES is unbiased where its guide is the
posterior, biased like √KL where it is not, and importance weights take most of that bias away. The
importance bound is consistent as its particles grow, and the unrolled ratio as its steps do.
"""

import itertools
import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import oracles
import pytest
from jax.nn import log_sigmoid, logsumexp, sigmoid
from numpyro.distributions import constraints
from numpyro.infer import Trace_ELBO
from oracles import assert_unbiased, draws, flat, jit, z_scores
from registry.marginals import MARGINALS

import numpyro_ebm as ebm
from numpyro_ebm import marginals
from numpyro_ebm.guides.guide import Guide
from numpyro_ebm.marginals import enumerated
from numpyro_ebm.marginals.vages import cumulant_surrogate
from numpyro_ebm.model.reading import read_model

pytestmark = pytest.mark.usefixtures("x64")


def bound(marginal, system, rng_key, params, *, order=2, data=None):
    """A marginal at the data of a system: the estimate, and the point in rows."""
    data = jnp.asarray(system.data if data is None else data)
    row_model = read_model(system.model, (data,), {}, params)
    guide = None if system.guide is None else Guide(system.guide, row_model, (data,), {})
    point = row_model.unconstrain_visible()
    return marginal.bind(rng_key, row_model, guide, params, point, order=order), point


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


# The closed forms themselves


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


# Exact and Enumerated: closed forms and brute force


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


W = np.array([[1.0, -0.7], [0.4, 0.9]])


def bowl(v):
    return 0.5 * jnp.sum(v**2, -1)


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


def grbm_log_joint(p, v, h):
    field = (v @ p["W"] + p["c"]) @ h
    return field - 0.5 * jnp.sum(((v - p["b"]) / p["scale"]) ** 2, -1)


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

DATA = np.random.default_rng(3).normal(size=(3, 2))


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


def lateral_in_a_plate(data):
    """The energy couples the units of a plate from outside of it: no product of sums."""
    with numpyro.plate("data", len(data), dim=-1):
        v = numpyro.sample("v", ebm.Lebesgue(event_shape=(2,)), obs=data)
        with numpyro.plate("hidden", 2, dim=-2):
            h = numpyro.sample("h", ebm.Counting())
        ebm.energy("E", bowl(v) - jnp.sum(h * (v @ W).T, -2))


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


# VaGES with the exact posterior


UNBIASED = [name for name, marginal in MARGINALS.items() if marginal.system]


def test_every_marginal_is_in_the_registry():
    members = [getattr(marginals, name) for name in marginals.__all__]
    exported = {x for x in members if issubclass(x, marginals.Marginal)}
    assert {type(marginal.make()) for marginal in MARGINALS.values()} == exported
    tests = [x.read_text() for x in Path(__file__).parent.glob("test_*.py")]
    for name in set(MARGINALS) - set(UNBIASED):  # exact in a limit: they have tests of their own
        assert any(re.search(rf"\b{name}\(", text) for text in tests), name


def estimates(marginal, system, order):
    """What a marginal says of the score, its gradient, and the same of the Hessian trace."""
    params = jax.tree.map(jnp.asarray, system.params)

    def one(rng_key):
        estimate, point = bound(marginal, system, rng_key, params, order=order)
        (u,) = point.values()

        def score(params):
            return jax.grad(lambda u: jnp.sum(estimate.log_density(params, {"v": u})))(u)

        def trace(params):
            def along(e):
                gradient = jax.grad(lambda u: jnp.sum(estimate.log_density(params, {"v": u})))
                return jnp.sum(jax.jvp(gradient, (u,), (jnp.broadcast_to(e, u.shape),))[1] * e, -1)

            return jnp.sum(jax.vmap(along)(jnp.eye(u.shape[-1])), 0)

        out = estimate.score(point)["v"], score(params), jax.jacrev(score)(params)
        return (*out, trace(params), jax.jacrev(trace)(params)) if order == 3 else out

    def exact():
        points = jnp.asarray(system.unconstrain(system.data))
        score = lambda p: jax.vmap(partial(system.score, p))(points)  # noqa: E731
        trace = lambda p: jax.vmap(partial(system.trace, p))(points)  # noqa: E731
        out = score(params), score(params), jax.jacrev(score)(params)
        return (*out, trace(params), jax.jacrev(trace)(params)) if order == 3 else out

    return one, np.asarray(jit(lambda: flat(exact()))())


def check_registry(name, num_draws):
    make, system, order, _ = MARGINALS[name]
    marginal = make()
    one, expected = estimates(
        marginal, system(num_rows=2) if "plate" not in name else system(), order
    )
    if not marginal.needs_guide:
        result = draws(one, jax.random.key(0), 2)[1]
        np.testing.assert_allclose(result, expected, rtol=1e-9, atol=1e-12)
        return
    samples = draws(one, jax.random.key(1), num_draws)
    assert np.all(np.isfinite(samples))
    assert_unbiased(samples, expected, name)


@pytest.mark.parametrize(
    "name", [name for name in UNBIASED if name != "VaGES, weighted, continuous"]
)
def test_derivatives_are_those_of_the_exact_marginal(name):
    check_registry(name, 8_000)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in UNBIASED if "VaGES" in name])
def test_derivatives_are_those_of_the_exact_marginal_to_three_digits(name):
    check_registry(name, 100_000)


# The guide is not the posterior: bias of the order of √KL


SQRT_KL = {
    "W": np.random.default_rng(5).normal(size=(2, 4)),
    "b": np.array([0.1, -0.2]),
    "c": np.array([0.3, -0.4, 0.2, 0.0]),
    "scale": np.array([0.9, 1.2]),
}


class Given:
    """A refinement that replaces the particles by given ones, in both roles and all rows."""

    def __init__(self, particles):
        self.particles = particles  # (L, hidden)

    def __call__(self, rng_key, row_model, params, visible, latent):
        h = jnp.concatenate([self.particles, self.particles]).astype(latent["h"].dtype)
        return {"h": jnp.broadcast_to(h[:, None], latent["h"].shape)}


def vages_of_all_pairs(system, params):
    """The library's VaES and VaGES of L = 2, for every pair of states, rows third."""
    states = jnp.asarray(oracles.binary_states(4))
    pairs = jnp.asarray(list(itertools.product(range(16), repeat=2)))

    def of(pair):
        marginal = ebm.VaGES(2, refine=Given(states[pair]))
        estimate, point = bound(marginal, system, jax.random.key(0), params)

        def score(params):
            return jax.grad(lambda u: jnp.sum(estimate.log_density(params, {"v": u})))(point["v"])

        jacobian = jax.jacfwd(score)(params)
        rows = len(point["v"])
        return estimate.score(point)["v"], jnp.concatenate(
            [jacobian[k].reshape(rows, 2, -1) for k in sorted(params)], -1
        )

    out = jit(lambda: jax.lax.map(of, pairs))()
    return [np.asarray(x).reshape(16, 16, *x.shape[1:]) for x in out]


def test_bias_grows_like_the_square_root_of_the_divergence():
    """Expectations over pairs of particles are exact sums over the library's estimates."""
    rng = np.random.default_rng(1)
    params = {name: jnp.asarray(x) for name, x in SQRT_KL.items()}
    data = rng.normal(size=(100, 2)) * 1.5
    system = oracles.grbm_system(params=params)._replace(
        data=data,
        model=partial(ebm.models.grbm, num_hidden=4),
        guide=oracles.grbm_guide(params=SQRT_KL),
    )
    vaes, vages = vages_of_all_pairs(system, params)
    over_rows = jax.vmap(partial(oracles.grbm_score, params))
    exact_score = over_rows(jnp.asarray(data))
    jacobian = jax.vmap(jax.jacfwd(oracles.grbm_score), (None, 0))(params, jnp.asarray(data))
    exact_gradient = np.concatenate(
        [np.reshape(jacobian[k], (len(data), 2, -1)) for k in sorted(params)], -1
    )

    states = oracles.binary_states(4)
    logits = data @ SQRT_KL["W"] + SQRT_KL["c"]

    def probabilities(logits):
        on = 1 / (1 + np.exp(-logits))[:, None]
        return np.prod(np.where(states, on, 1 - on), -1)  # (rows, states)

    p = probabilities(logits)
    # Single-state functions f = ∇_v log p̃, g = ∇_θ log p̃ and ∇_θ f, for the bound.
    f, mixed = vaes[np.arange(16), np.arange(16)], vages[np.arange(16), np.arange(16)]
    g = state_gradients(params, data, states)
    f_centred = f - np.einsum("ns,snd->nd", p, f)
    g_centred = g - np.einsum("ns,snk->nk", p, g)
    product = f_centred[..., :, None] * g_centred[..., None, :]
    span = lambda x: np.ptp(x, axis=0)  # noqa: E731

    divergence, bias_vaes, bias_vages = [], [], []
    for delta in np.geomspace(0.01, 0.3, 7):
        q = probabilities(logits + delta * rng.normal(size=logits.shape))
        tv = 0.5 * np.sum(np.abs(q - p), -1)[:, None]
        divergence.append(np.mean(np.sum(q * np.log(q / p), -1)))
        score = np.einsum("na,nb,abnd->nd", q, q, vaes) - exact_score
        gradient = np.einsum("na,nb,abndk->ndk", q, q, vages) - exact_gradient
        assert np.all(np.abs(score) <= span(f) * tv + 1e-12)
        tv = tv[:, None]
        covariance = span(product) * tv + span(f)[..., :, None] * span(g)[..., None, :] * tv**2
        assert np.all(np.abs(gradient) <= span(mixed) * tv + covariance + 1e-12)
        bias_vaes.append(np.mean(np.linalg.norm(score, axis=-1)))
        bias_vages.append(np.mean(np.linalg.norm(gradient, axis=(1, 2))))
    for name, bias in (("VaES", bias_vaes), ("VaGES", bias_vages)):
        slope = np.polyfit(np.log(divergence), np.log(bias), 1)[0]
        print(f"{name}: slope {slope:.4f}, bias {bias[0]:.1e} at KL {divergence[0]:.1e}")
        assert abs(slope - 0.5) < 0.05
    # Not a bias of the sums themselves: at the posterior it is nil.
    np.testing.assert_allclose(np.einsum("na,nb,abnd->nd", p, p, vaes), exact_score, atol=1e-12)
    np.testing.assert_allclose(
        np.einsum("na,nb,abndk->ndk", p, p, vages), exact_gradient, atol=1e-11
    )


def state_gradients(params, data, states):
    """∇_θ log p̃(v, h) of every state and row: (states, rows, parameters in sorted order)."""

    def log_joint(params, v, h):
        return grbm_log_joint(params, v[None], h)[0]

    over = jax.vmap(jax.vmap(jax.grad(log_joint), (None, 0, None)), (None, None, 0))
    gradient = jit(over)(params, jnp.asarray(data), jnp.asarray(states, float))
    return np.concatenate(
        [np.reshape(gradient[k], (*gradient[k].shape[:2], -1)) for k in sorted(params)], -1
    )


def test_one_particle_set_in_both_roles_would_be_biased():
    """½‖s + o‖² with one set for the value and the derivative, against the library's two."""
    system = oracles.grbm_system(num_rows=2)
    params = jax.tree.map(jnp.asarray, system.params)
    data = jnp.asarray(system.data)
    noise = jnp.asarray(np.random.default_rng(2).normal(size=data.shape))
    sigma = 0.5
    levels = jnp.full(len(data), sigma)
    oracle = oracles.denoising(system, levels, noise)
    expected = flat(jit(jax.value_and_grad(oracle))(params))
    point = data + sigma * noise

    def shared(rng_key):
        logits = point @ params["W"] + params["c"]
        h = 1.0 * jax.random.bernoulli(rng_key, jax.nn.sigmoid(logits), (2, *logits.shape))

        def loss(params):
            def log_density(u):
                log_joint = jax.vmap(lambda h: jnp.sum((u @ params["W"] + params["c"]) * h, -1))(h)
                bowl = 0.5 * jnp.sum(((u - params["b"]) / params["scale"]) ** 2, -1)
                return jnp.sum(cumulant_surrogate(log_joint - bowl, 2))

            return 0.5 * jnp.mean(jnp.sum((jax.grad(log_density)(point) + noise / sigma) ** 2, -1))

        return jax.value_and_grad(loss)(params)

    objective = ebm.DenoisingScoreMatching(sigma, ebm.VaGES(2), variance_reduction=False)

    def library(rng_key):
        problem = objective.prepare(
            jax.random.key(0), params, system.model, system.guide, (data,), {}
        )
        problem = problem._replace(unconstrained={"v": point}, noise={"v": noise})
        return jax.value_and_grad(lambda p: objective.energy_loss(rng_key, p, problem))(params)

    samples = draws(library, jax.random.key(1), 20_000)
    assert_unbiased(samples, expected, "two sets")
    z = np.abs(z_scores(draws(shared, jax.random.key(1), 20_000), expected))
    print(f"one set: max |z| = {z.max():.1f}")
    assert z[0] > 10, "the value"
    assert np.sum(z[1:] > 4) >= 4, "the gradient"


@pytest.mark.parametrize("importance_weighted", [False, True])
def test_particles_are_hard(importance_weighted):
    """A term that vanishes on {0, 1} only leaves value and gradient as they are, bit for bit."""
    system = oracles.grbm_system()
    data = jnp.asarray(system.data)
    objective = ebm.DenoisingScoreMatching(
        0.3, ebm.VaGES(2, importance_weighted=importance_weighted)
    )

    def with_well(depth):
        def model(data):
            c = numpyro.param("c", jnp.zeros(3))
            W = numpyro.param("W", jnp.zeros((2, 3)))
            with numpyro.plate("data", len(data)):
                v = numpyro.sample("v", ebm.Lebesgue(event_shape=(2,)), obs=data)
                h = numpyro.sample("h", ebm.Counting(event_shape=(3,)))
                well = depth * jnp.sum((1 + jnp.sum(v**2, -1, keepdims=True)) * h * (1 - h), -1)
                ebm.energy("E", bowl(v) - jnp.sum((c + v @ W) * h, -1) + well)

        return model

    @jit
    def of(depth, rng_key):
        params = {"c": jnp.asarray(system.params["c"]), "W": jnp.asarray(system.params["W"])}
        loss = lambda p: objective.loss(rng_key, p, with_well(depth), system.guide, data)  # noqa: E731
        return jax.value_and_grad(loss)(params)

    for seed in range(3):
        result, expected = of(1e3, jax.random.key(seed)), of(0.0, jax.random.key(seed))
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-12), result, expected)


# A guide that cannot be the posterior


def lateral_bias(num_draws, settings):
    """Bias of the DSM gradient with the best mean-field guide, for each marginal."""
    rng = np.random.default_rng(4)
    sigma = 0.3
    clean, noise = rng.normal(size=(2, 6, 2))
    system = oracles.lateral_system(clean)
    point = clean + sigma * noise
    logits = np.stack([oracles.mean_field(oracles.LATERAL, v) for v in point])
    guide = oracles.table_guide(logits)
    params = jax.tree.map(jnp.asarray, oracles.LATERAL)
    oracle = oracles.denoising(system, jnp.full(6, sigma), jnp.asarray(noise))
    exact = np.asarray(flat(jit(jax.grad(oracle))(params)))
    norms = {}
    for name, marginal in settings.items():
        objective = ebm.DenoisingScoreMatching(sigma, marginal, variance_reduction=False)

        def gradient(rng_key, objective=objective):
            data = jnp.asarray(clean)
            problem = objective.prepare(jax.random.key(0), params, system.model, guide, (data,), {})
            problem = problem._replace(
                unconstrained={"v": jnp.asarray(point)}, noise={"v": jnp.asarray(noise)}
            )
            return jax.grad(lambda p: objective.energy_loss(rng_key, p, problem))(params)

        samples = draws(gradient, jax.random.key(6), num_draws)
        bias = samples.mean(0) - exact
        variance = np.sum(samples.var(0, ddof=1)) / num_draws
        norms[name] = np.sqrt(max(np.sum(bias**2) - variance, 0.0))
    return norms, np.linalg.norm(exact)


def test_importance_weights_take_most_of_the_bias_of_a_mean_field_guide():
    weighted = ebm.VaGES(20, importance_weighted=True)
    norms, size = lateral_bias(5_000, {"plain": ebm.VaGES(2), "weighted": weighted})
    removed = 1 - norms["weighted"] / norms["plain"]
    print(f"gradient {size:.3f}, bias {norms}, removed {removed:.1%}")
    assert norms["plain"] > 0.08 * size
    assert removed > 0.8


@pytest.mark.slow
def test_more_particles_take_more_of_the_bias_away():
    weighted = {f"L={n}": ebm.VaGES(n, importance_weighted=True) for n in (5, 10, 20)}
    norms, size = lateral_bias(40_000, {"plain": ebm.VaGES(2), **weighted})
    removed = {name: 1 - norm / norms["plain"] for name, norm in norms.items()}
    print(f"gradient {size:.3f}, bias {norms}, removed {removed}")
    assert removed["L=5"] > 0.5
    assert removed["L=10"] > 0.7
    assert removed["L=20"] > 0.8


# Refinement


def test_langevin_steps_move_a_wrong_guide_to_the_posterior():
    system = oracles.linear_system(num_rows=2)._replace(guide=oracles.linear_guide(shift=1.0))
    wrong, expected = estimates(ebm.VaGES(2), system, 2)
    z = z_scores(draws(wrong, jax.random.key(0), 2_000), expected)
    assert np.max(np.abs(z)) > 20
    refine = ebm.LangevinRefinement(num_steps=60, step_size=0.15, adjusted=True)
    moved, _ = estimates(ebm.VaGES(2, refine=refine), system, 2)
    assert_unbiased(draws(moved, jax.random.key(1), 4_000), expected, "refined")


def test_langevin_refinement_refuses_discrete_latents():
    system = oracles.grbm_system()
    with pytest.raises(ebm.ModelError, match="'h' is discrete.*continuous"):
        bound(
            ebm.VaGES(2, refine=ebm.LangevinRefinement()), system, jax.random.key(0), system.params
        )


def test_a_guide_over_all_latents_but_the_visible_plate_works_for_lateral_plates():
    """What `Enumerated` refuses, units of a plate coupled from outside it, VaGES serves."""
    posterior = np.array([0.3, -0.1]) @ W

    def guide(data):
        with numpyro.plate("data", len(data), dim=-1):
            v = ebm.visible("v", data)
            with numpyro.plate("hidden", 2, dim=-2):
                numpyro.sample("h", dist.Bernoulli(logits=(v @ W).T))

    data = jnp.asarray(np.array([[0.3, -0.1]]))
    row_model = read_model(lateral_in_a_plate, (data,))
    reader = Guide(guide, row_model, (data,), {})

    def score(rng_key):
        estimate = ebm.VaGES(2).bind(
            rng_key, row_model, reader, {}, row_model.unconstrain_visible()
        )
        return estimate.score(row_model.unconstrain_visible())

    expected = W @ sigmoid(posterior) - data[0]
    assert_unbiased(draws(score, jax.random.key(0), 2_000), expected, "lateral plate")


# The importance-weighted bound


def bound_derivatives(marginal, system):
    """Value, both scores, θ-gradient and mixed derivative of a marginal; and what they should be.

    The leaves are lists in this order.
    """
    params = jax.tree.map(jnp.asarray, system.params)

    def of(log_density, u):
        def score(params):
            return jax.grad(lambda u: jnp.sum(log_density(params, u)))(u)

        value = log_density(params, u)
        gradient = jax.jacrev(lambda p: log_density(p, u))(params)
        return [value, score(params), gradient, jax.jacrev(score)(params)]

    def one(rng_key):
        estimate, point = bound(marginal, system, rng_key, params)
        log_density = lambda p, u: estimate.log_density(p, {"v": u})  # noqa: E731
        return [estimate.score(point)["v"], *of(log_density, point["v"])]

    rows = jax.vmap(system.log_density, (None, 0))
    points = jnp.asarray(system.unconstrain(system.data))
    value, score, *rest = jit(lambda: of(rows, points))()
    return one, [np.asarray(flat(x)) for x in (score, value, score, *rest)]


def split_like(samples, parts):
    return np.split(samples, np.cumsum([x.size for x in parts])[:-1], axis=-1)


@pytest.mark.parametrize("num_particles", [1, 3])
@pytest.mark.parametrize("make", [oracles.grbm_system, oracles.linear_system])
def test_importance_bound_is_exact_at_the_posterior(make, num_particles):
    """Its value has no variance there; its first derivatives are unbiased, its second are not."""
    one, expected = bound_derivatives(ebm.ImportanceBound(num_particles), make(num_rows=2))
    samples = split_like(draws(one, jax.random.key(0), 6_000), expected)
    np.testing.assert_allclose(samples[1], np.broadcast_to(expected[1], samples[1].shape), 1e-9)
    for what, x, y in zip(["score", "", "score in v", "gradient"], samples, expected, strict=False):
        assert_unbiased(x, y, what)
    # What is missing of the posterior covariance is 1/L of it: why VaGES has its L/(L - 1).
    assert np.max(np.abs(z_scores(samples[-1], expected[-1]))) > 10


def all_weights(v, shift):
    """log q(h | v) and log p̃(v, h) - log q(h | v) of every state, for one row."""
    states = oracles.binary_states(3)
    logits = v @ oracles.GRBM["W"] + oracles.GRBM["c"] + shift
    log_q = np.sum(np.asarray(log_sigmoid(jnp.asarray(np.where(states, logits, -logits)))), -1)
    log_p = np.array([float(grbm_log_joint(oracles.GRBM, v[None], h)[0]) for h in states])
    return log_q, log_p - log_q


def test_importance_bound_rises_to_the_marginal_from_below():
    """Its expectation, by enumeration of all tuples of particles; the ELBO for one of them."""
    shift = 0.8
    system = oracles.grbm_system(num_rows=2)._replace(guide=oracles.grbm_guide(shift))
    exact = np.array([float(oracles.grbm_log_density(oracles.GRBM, v)) for v in system.data])
    last = np.full(2, -np.inf)
    for particles in (1, 2, 4):
        expected = []
        for v in system.data:
            log_q, log_w = all_weights(v, shift)
            tuples = np.array(list(itertools.product(range(8), repeat=particles)))
            values = np.logaddexp.reduce(log_w[tuples], -1) - np.log(particles)
            expected.append(np.exp(log_q[tuples].sum(-1)) @ values)
        expected = np.array(expected)
        assert np.all(last < expected)
        assert np.all(expected < exact)
        last = expected

        def value(rng_key, particles=particles):
            marginal = ebm.ImportanceBound(particles)
            estimate, point = bound(marginal, system, rng_key, system.params)
            return estimate.log_density(system.params, point)

        samples = draws(value, jax.random.key(1), 20_000)
        assert_unbiased(samples, expected, f"{particles} particles")
        assert np.min(np.abs(z_scores(samples, exact))) > 10


def test_importance_bound_is_consistent_with_a_wrong_guide():
    wrong = oracles.grbm_guide(0.8)
    errors = {}
    for particles in (1, 8, 64):
        system = oracles.grbm_system(num_rows=2)._replace(guide=wrong)
        one, expected = bound_derivatives(ebm.ImportanceBound(particles), system)
        samples = split_like(draws(one, jax.random.key(2), 4_000), expected)
        errors[particles] = np.array(
            [np.linalg.norm(x.mean(0) - y) for x, y in zip(samples, expected, strict=True)]
        )
    print(errors)
    assert np.all(errors[8] < 0.35 * errors[1])
    assert np.all(errors[64] < 0.08 * errors[1])


def test_importance_weights_alone_excuse_a_guide_that_ignores_the_visible_sites():
    def coin(data):
        with numpyro.plate("data", len(data)):
            numpyro.sample("h", dist.Bernoulli(0.5 * jnp.ones(3)).to_event(1))

    system = oracles.grbm_system(num_rows=2)
    params, data = jax.tree.map(jnp.asarray, system.params), jnp.asarray(system.data)

    def prepare(marginal):
        objective = ebm.DenoisingScoreMatching(0.3, marginal)
        return objective.prepare(jax.random.key(0), params, system.model, coin, (data,), {})

    for marginal in (ebm.ImportanceBound(4), ebm.VaGES(2, importance_weighted=True)):
        assert prepare(marginal).marginal is marginal
    for marginal in (ebm.VaGES(2), ebm.Unrolled(1)):
        with pytest.raises(ebm.ModelError, match="ignores the visible sites"):
            prepare(marginal)


# The unrolled ratio


def with_noise(objective, system, names):
    """A problem at fixed noise, the loss of the model's parameters, and what it should be.

    :return: loss ``(marginal, rng_key, own) -> scalar``, the model's parameters, and value and
        gradient of the exact denoising loss at the same noise.
    """
    params = jax.tree.map(jnp.asarray, system.params)
    own = {name: params[name] for name in names}
    data = jnp.asarray(system.data)
    problem = objective.prepare(jax.random.key(5), params, system.model, system.guide, (data,), {})
    levels = jnp.full(len(data), objective.noise_scale)
    oracle = oracles.denoising(system, levels, problem.noise["v"])
    expected = jit(lambda: jax.value_and_grad(oracle)(own))()

    def loss(marginal, rng_key, own):
        posed = problem._replace(marginal=marginal)
        return objective.energy_loss(rng_key, {**params, **own}, posed)

    return loss, own, jax.tree.map(np.asarray, expected)


def unrolled_gradients(system, names, make, steps, num_draws):
    """Draws of value and gradient of the DSM loss for each number of steps, and the exact ones."""
    objective = ebm.DenoisingScoreMatching(0.5, make(0), variance_reduction=False)
    loss, own, expected = with_noise(objective, system, names)

    def of(num_steps):
        marginal = make(num_steps)
        one = lambda key: jax.value_and_grad(partial(loss, marginal, key))(own)  # noqa: E731
        return draws(one, jax.random.key(1), num_draws)

    return {n: of(n) for n in steps}, np.asarray(flat(expected))


def biases(samples, expected):
    """Norm of the bias of the gradient for each number of steps, its own noise taken off."""
    found = {}
    for num_steps, x in samples.items():
        x = x[:, 1:]
        square = np.sum((x.mean(0) - expected[1:]) ** 2) - np.sum(x.var(0, ddof=1)) / len(x)
        found[num_steps] = np.sqrt(max(square, 0.0))
    print(f"gradient {np.linalg.norm(expected[1:]):.3f}, bias {found}")
    return found


LINEAR_NAMES, GRBM_NAMES = ("A", "b", "scale"), ("W", "b", "c", "scale")


@pytest.mark.slow
def test_unrolled_steps_make_the_gradient_of_a_linear_gaussian_model_exact():
    """From the exact posterior, by steps of `PosteriorScore`, whose gradient vanishes there.

    The score is exact for every draw whatever N is. So is, with many steps, the gradient in b and
    the scale, where the guide can follow the posterior; A couples its coordinates, which a product
    of Normals follows in the mean only.
    """
    system = oracles.with_learned_guide(oracles.linear_system(num_rows=30))

    def make(num_steps):
        return ebm.Unrolled(num_steps, step_size=0.1, guide_loss=ebm.PosteriorScore())

    samples, expected = unrolled_gradients(system, LINEAR_NAMES, make, (0, 5, 40, 200), 60)
    for x in samples.values():
        np.testing.assert_allclose(x[:, 0], expected[0], rtol=1e-9)
    bias = biases(samples, expected)
    assert bias[0] > 0.08 * np.linalg.norm(expected[1:])
    assert bias[0] > bias[5] > bias[40] > bias[200]
    assert bias[200] < 0.1 * bias[0]
    exact = np.abs(samples[200][:, 7:] - expected[7:])  # value, A, then b and the scale
    assert np.max(exact) < 0.05 * np.max(np.abs(samples[0][:, 7:] - expected[7:]))


@pytest.mark.slow
def test_unrolled_steps_of_an_elbo_do_so_too():
    system = oracles.with_learned_guide(oracles.linear_system(num_rows=30))

    def make(num_steps):
        loss = Trace_ELBO(num_particles=10)
        return ebm.Unrolled(num_steps, step_size=0.05, guide_loss=loss)

    samples, expected = unrolled_gradients(system, LINEAR_NAMES, make, (0, 5, 50), 150)
    bias = biases(samples, expected)
    assert bias[0] > bias[5] > bias[50]
    assert bias[50] < 0.2 * bias[0]


def grbm_unrolled(steps, num_draws):
    system = oracles.with_learned_guide(oracles.grbm_system(num_rows=60))
    make = partial(ebm.Unrolled, step_size=0.5)
    return biases(*unrolled_gradients(system, GRBM_NAMES, make, steps, num_draws))


def test_unrolled_steps_of_a_relaxed_guide_take_the_bias_away():
    bias = grbm_unrolled((0, 5, 50), 300)
    assert bias[0] > 0.25
    assert bias[0] > bias[5] > bias[50]
    assert bias[50] < 0.15 * bias[0]


@pytest.mark.slow
def test_many_unrolled_steps_of_a_relaxed_guide_are_no_worse():
    bias = grbm_unrolled((0, 200), 300)
    assert bias[200] < 0.1 * bias[0]


class LogitDistance:
    """A guide loss without randomness, so that the steps can be written out."""

    can_infer_discrete = True

    def rows(self, rng_key, params, guide_params, problem):
        v = problem.unconstrained["v"]
        return self.of(params, guide_params, v)

    @staticmethod
    def of(p, q, v):
        return 0.5 * jnp.sum((v @ q["A"] + q["d"] - v @ p["W"] - p["c"]) ** 2, -1)


def wrong_grbm_guide(num_rows):
    system = oracles.with_learned_guide(oracles.grbm_system(num_rows=num_rows))
    wrong = {"A": system.params["A"] * 0.5, "d": system.params["d"] + 0.4}
    return system._replace(params={**system.params, **wrong})


@pytest.mark.parametrize("num_steps", [0, 1, 4])
def test_unrolled_equals_steps_written_out(num_steps):
    """Every row has one of the eight derivatives that its latent state can give."""
    system = wrong_grbm_guide(3)
    step_size = 0.3
    marginal = ebm.Unrolled(num_steps, step_size=step_size, guide_loss=LogitDistance())
    params = jax.tree.map(jnp.asarray, system.params)
    own = {name: params[name] for name in GRBM_NAMES}
    data = jnp.asarray(system.data)

    @jit
    def library(rng_key):
        estimate, point = bound(marginal, system, rng_key, params)

        def score(own):
            total = lambda u: jnp.sum(estimate.log_density({**params, **own}, {"v": u}))  # noqa: E731
            return jax.grad(total)(point["v"])

        jacobian = jax.jacrev(score)(own)
        parts = [jacobian[k].reshape(3, 2, -1) for k in GRBM_NAMES]
        return estimate.score(point)["v"], score(own), jnp.concatenate(parts, -1)

    @jit
    def by_hand():
        def score(own, row, h):
            guide = {"A": params["A"], "d": params["d"]}
            for _ in range(num_steps):
                slope = jax.grad(lambda q: jnp.mean(LogitDistance.of(own, q, data)))(guide)
                guide = jax.tree.map(lambda x, g: x - step_size * g, guide, slope)
            pull = own["W"] @ h - (row - own["b"]) / own["scale"] ** 2
            return pull - guide["A"] @ (h - sigmoid(row @ guide["A"] + guide["d"]))

        states = jnp.asarray(oracles.binary_states(3), float)
        both = lambda own, row, h: (score(own, row, h), jax.jacrev(score)(own, row, h))  # noqa: E731
        over = jax.vmap(jax.vmap(both, (None, None, 0)), (None, 0, None))
        scores, jacobian = over(own, data, states)
        parts = [jacobian[k].reshape(3, 8, 2, -1) for k in GRBM_NAMES]
        return scores, jnp.concatenate(parts, -1)

    scores, jacobians = map(np.asarray, by_hand())
    for seed in range(4):
        first, second, jacobian = map(np.asarray, library(jax.random.key(seed)))
        for row in range(3):
            assert np.min(np.max(np.abs(scores[row] - first[row]), -1)) < 1e-12
            state = np.argmin(np.max(np.abs(scores[row] - second[row]), -1))
            np.testing.assert_allclose(second[row], scores[row, state], rtol=1e-10)
            np.testing.assert_allclose(jacobian[row], jacobians[row, state], rtol=1e-9, atol=1e-12)


def test_unrolled_to_the_end_is_the_exact_marginal_from_any_guide():
    """A loss without randomness finds the posterior, and keeps to it as θ moves."""
    system = wrong_grbm_guide(12)
    marginal = ebm.Unrolled(1_000, step_size=0.5, guide_loss=LogitDistance())
    objective = ebm.DenoisingScoreMatching(0.5, marginal, variance_reduction=False)
    loss, own, expected = with_noise(objective, system, GRBM_NAMES)
    result = jit(lambda key: jax.value_and_grad(partial(loss, marginal, key))(own))
    for seed in range(2):
        found = flat(result(jax.random.key(seed)))
        np.testing.assert_allclose(found, flat(expected), rtol=1e-6, atol=1e-8)


UNROLLED = {
    "ELBO": (oracles.linear_system, LINEAR_NAMES, None, 0.1),
    "PosteriorScore": (oracles.linear_system, LINEAR_NAMES, ebm.PosteriorScore(), 0.1),
    "RelaxedELBO": (oracles.grbm_system, GRBM_NAMES, None, 0.3),
}


@pytest.mark.parametrize(
    "name", [pytest.param("ELBO", marks=pytest.mark.slow), "PosteriorScore", "RelaxedELBO"]
)
def test_the_derivative_through_the_steps_is_that_of_finite_differences(name):
    """At fixed random numbers, of the value and of the score along a direction."""
    make, names, guide_loss, step_size = UNROLLED[name]
    system = oracles.with_learned_guide(make())
    params = jax.tree.map(jnp.asarray, system.params)
    own = {key: params[key] for key in names}
    marginal = ebm.Unrolled(3, step_size=step_size, num_particles=2, guide_loss=guide_loss)
    rng = np.random.default_rng(6)
    along = jnp.asarray(rng.normal(size=system.data.shape))
    direction = {k: jnp.asarray(rng.normal(size=np.shape(x))) for k, x in own.items()}

    def both(marginal, distance):
        estimate, point = bound(marginal, system, jax.random.key(3), params)
        moved = {k: own[k] + distance * direction[k] for k in own}
        log_density = lambda u: jnp.sum(  # noqa: E731
            estimate.log_density({**params, **moved}, {"v": u})
        )
        value, score = jax.jvp(log_density, (point["v"],), (along,))
        return jnp.stack([value, score])

    small = 1e-5
    slope = jit(jax.jacrev(partial(both, marginal)))(0.0)
    ends = jit(jax.vmap(partial(both, marginal)))(jnp.array([-small, small]))
    np.testing.assert_allclose(slope, (ends[1] - ends[0]) / (2 * small), rtol=1e-6)
    still = jit(jax.jacrev(partial(both, ebm.Unrolled(0, num_particles=2))))(0.0)
    assert np.all(np.abs(slope - still) > 1e-3)


BI_LEVEL = {
    "BiDSM": partial(ebm.DenoisingScoreMatching, 0.3),
    "BiMDSM": partial(
        ebm.MultiscaleDenoisingScoreMatching, min_noise_scale=0.1, max_noise_scale=0.5
    ),
    "BiSSM": ebm.SlicedScoreMatching,
}


@pytest.mark.parametrize("name", BI_LEVEL)
def test_bi_level_objectives_train_a_step(name):
    if name == "BiDSM":
        marginal = ebm.Unrolled(2, step_size=0.1, guide_loss=ebm.PosteriorScore())
        system = oracles.with_learned_guide(oracles.linear_system())
    else:
        marginal = ebm.Unrolled(2)
        system = wrong_grbm_guide(4)  # at the posterior a relaxed guide does not move
    objective = BI_LEVEL[name](marginal=marginal)
    svi = ebm.EnergySVI(system.model, system.guide, optax.adam(0.01), objective)
    data = jnp.asarray(system.data)
    start = jax.tree.map(jnp.asarray, system.params)

    state = svi.init(jax.random.key(0), data, init_params=start)
    state, loss = jit(svi.update)(state, data)
    after = svi.get_params(state)
    assert np.isfinite(loss)
    for key, value in start.items():
        assert np.all(np.isfinite(after[key])), key
        assert np.all(after[key] != value), key


def three_states(data):
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        h = numpyro.sample("h", ebm.Counting(3))
        ebm.energy("E", 0.5 * (v - h) ** 2)


def three_guide(data):
    slope = numpyro.param("slope", jnp.zeros(3))
    with numpyro.plate("data", len(data)):
        v = ebm.visible("v", data)
        numpyro.sample("h", dist.Categorical(logits=v[:, None] * slope))


def test_draws_that_cannot_be_differentiated_are_told_of_vages():
    data = jnp.asarray(DATA[:, 0])
    objective = ebm.DenoisingScoreMatching(0.3, ebm.Unrolled(2))
    with pytest.raises(ebm.ModelError, match=r"\['h'\] cannot be differentiated.*VaGES"):
        objective.loss(jax.random.key(0), {"slope": jnp.zeros(3)}, three_states, three_guide, data)
    # Nor is an ELBO that drops the part of the gradient it cannot see taken instead.
    system = oracles.with_learned_guide(oracles.grbm_system())
    marginal = ebm.Unrolled(1, guide_loss=Trace_ELBO())
    with pytest.raises(ebm.ModelError, match="cannot be differentiated.*VaGES"):
        bound(marginal, system, jax.random.key(0), system.params)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ebm.ImportanceBound(0), "ImportanceBound: `num_particles`.*positive.*got 0"),
        (lambda: ebm.ImportanceBound(2.0), "`num_particles` must be a positive integer"),
        (lambda: ebm.Unrolled(-1), "`num_steps` must be an integer of at least 0, got -1"),
        (lambda: ebm.Unrolled(1.5), "`num_steps` must be an integer"),
        (lambda: ebm.Unrolled(step_size=0.0), "`step_size` must be positive, got 0.0"),
        (lambda: ebm.Unrolled(step_size=-1.0), "`step_size` must be positive"),
        (lambda: ebm.Unrolled(num_particles=0), "`num_particles` must be a positive integer"),
    ],
)
def test_bad_options_of_the_bound_and_of_the_unrolled_ratio(make, message):
    with pytest.raises(ebm.ModelError, match=message):
        make()


# Units that do not interact


def units(data, *, num_hidden=3, site=None, energy=None):
    """A GRBM whose hidden site and its energy can be exchanged."""
    W = numpyro.param("W", jnp.zeros((2, num_hidden)))
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(event_shape=(2,)), obs=data)
        h = numpyro.sample("h", ebm.Counting(event_shape=(num_hidden,)) if site is None else site)
        field = v @ W
        coupled = jnp.sum(field * h, -1) if energy is None else energy(field, h)
        ebm.energy("E", 0.5 * jnp.sum(v**2, -1) - coupled)


def units_joint(num_hidden=3, **options):
    rng = np.random.default_rng(3)
    data, W = rng.normal(size=(4, 2)), jnp.asarray(rng.normal(size=(2, num_hidden)))
    model = partial(units, num_hidden=num_hidden, **options)
    return read_model(model, (jnp.asarray(data),), {}, {"W": W}), data, W


@pytest.mark.parametrize("num_hidden", [3, 200])
def test_units_that_do_not_interact_cost_one_gradient(num_hidden, x64):
    """Two hundred units have 2^200 states, and a closed form that the energy's operations show."""
    row_model, data, W = units_joint(num_hidden)
    marginal = ebm.Enumerated()
    marginal.check(row_model, None, 2)
    assert enumerated.factorises(row_model)

    def of(W, v):
        return marginal.log_density(row_model, {"W": W}, {"v": v})

    def closed(W, v):
        return jnp.sum(jax.nn.softplus(v @ W), -1) - 0.5 * jnp.sum(v**2, -1)

    v = jnp.asarray(data)
    for derivative in (
        lambda f: f,
        lambda f: jax.jacrev(lambda W, v: jnp.sum(f(W, v))),
        lambda f: jax.jacrev(jax.grad(lambda W, v: jnp.sum(f(W, v)), 1)),
        lambda f: jax.hessian(lambda W, v: jnp.sum(f(W, v)), 1),
    ):
        np.testing.assert_allclose(
            oracles.jit(derivative(of))(W, v), oracles.jit(derivative(closed))(W, v), atol=1e-10
        )


@pytest.mark.parametrize(
    "options",
    [
        {"energy": lambda field, h: jnp.sum(field * h, -1) + h[:, 0] * h[:, 1]},
        {"energy": lambda field, h: jnp.sum(field * h**2, -1)},  # h² = h, but who knows
        {"energy": lambda field, h: jnp.sum(jnp.where(h == 1, field, 0.0), -1)},
        {"energy": lambda field, h: jnp.sum(jnp.array([0.0, 1.0])[h] * field, -1)},
        {"site": ebm.Counting(3, event_shape=(3,))},
        {"site": dist.Bernoulli(0.3).expand([3]).to_event(1)},
    ],
)
def test_other_units_are_enumerated(options, x64):
    """Anything else is summed state by state, and right as well."""
    row_model, data, W = units_joint(**options)
    assert not enumerated.factorises(row_model)
    num_values = 3 if isinstance(options.get("site"), ebm.Counting) else 2
    expected = -np.inf
    energy = options.get("energy", lambda field, h: jnp.sum(field * h, -1))
    for state in itertools.product(range(num_values), repeat=3):
        h = jnp.broadcast_to(jnp.array(state), (4, 3))
        base = 0.0
        if "site" in options and num_values == 2:
            base = np.sum(np.log([0.7, 0.3])[list(state)])
        expected = np.logaddexp(expected, energy(data @ np.asarray(W), h) + base)
    expected = expected - 0.5 * np.sum(data**2, -1)
    found = ebm.Enumerated().log_density(row_model, {"W": W}, {"v": jnp.asarray(data)})
    np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_many_rows_in_single_precision():
    """JAX 0.10.2 summed 16 states wrongly from 2,304 rows on, under `jit` and on CPU."""
    system = oracles.grbm_system(num_rows=5_000)
    params = jax.tree.map(lambda x: jnp.asarray(x, "float32"), oracles.LATERAL)
    data = 3 * jnp.asarray(system.data, "float32")
    row_model = read_model(oracles.lateral, (data,), {}, params)
    found = jax.jit(lambda p, v: ebm.Enumerated().log_density(row_model, p, {"v": v}))(params, data)
    exact = jax.vmap(lambda v: jax.nn.logsumexp(oracles.lateral_log_joint(params, v)))(data)
    np.testing.assert_allclose(found, exact, rtol=1e-4, atol=1e-4)
