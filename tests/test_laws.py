# SPDX-License-Identifier: Apache-2.0
"""Laws of marginals and objectives, over every member; oracles are closed forms and enumeration."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax.nn import sigmoid, softplus

import numpyro_ebm as ebm
from numpyro_ebm.joint import Guide, read
from numpyro_ebm.marginal.vages import cumulant_surrogate

pytestmark = pytest.mark.usefixtures("x64")

KEY = jax.random.key(0)
RNG = np.random.default_rng(1)
PARAMS = {
    "W": RNG.normal(size=(2, 3)),
    "b": np.array([0.3, -0.2]),
    "c": np.array([0.5, -0.4, 0.1]),
    "scale": np.array([0.8, 1.1]),
}
DATA = RNG.normal(size=(6, 2))
STATES = np.array(list(itertools.product([0, 1], repeat=3)), float)


def params64():
    return {k: jnp.asarray(x) for k, x in PARAMS.items()}


def declare():
    W = numpyro.param("W", jnp.zeros((2, 3)))
    b, c = numpyro.param("b", jnp.zeros(2)), numpyro.param("c", jnp.zeros(3))
    return W, b, c, numpyro.param("scale", jnp.ones(2), constraint=dist.constraints.positive)


def event_units(data):
    W, b, c, scale = declare()
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue((2,)), obs=data)
        h = numpyro.sample("h", ebm.Counting(2, (3,)))
        ebm.energy("E", 0.5 * jnp.sum(((v - b) / scale) ** 2, -1) - h @ c - jnp.sum(v @ W * h, -1))


def plate_units(data):
    W, b, c, scale = declare()
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue((2,)), obs=data)
        ebm.energy("E", 0.5 * jnp.sum(((v - b) / scale) ** 2, -1))
        with numpyro.plate("units", 3, dim=-2):
            h = numpyro.sample("h", ebm.Counting(2))
            ebm.energy("E_h", -h * (c[:, None] + W.T @ v.T))


def no_latents(data):
    W, b, c, scale = declare()
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue((2,)), obs=data)
        bowl = 0.5 * jnp.sum(((v - b) / scale) ** 2, -1)
        ebm.energy("E", bowl - jnp.sum(softplus(c + v @ W), -1))


def posterior(data):
    """The exact posterior q(h | v), reading the model's parameters."""
    W, _, c, _ = declare()
    with numpyro.plate("data", len(data)):
        v = ebm.visible("v", data)
        numpyro.sample("h", dist.Bernoulli(logits=c + v @ W).to_event(1))


def log_marginal(p, v):
    """Brute force: log Σ_h exp(-E(v, h)) for one row v."""
    bowl = 0.5 * jnp.sum(((v - p["b"]) / p["scale"]) ** 2)
    return jax.scipy.special.logsumexp(STATES @ p["c"] + STATES @ (v @ p["W"])) - bowl


def score(p, v):
    return jax.vmap(lambda v: jax.grad(log_marginal, 1)(p, v))(v)


def assert_unbiased(samples, expected, limit=4.0):
    """Every component of a tree of draws has the expected mean, within standard errors."""
    for name in expected:
        x = np.asarray(samples[name])
        error = x.std(0, ddof=1) / np.sqrt(len(x)) + 1e-12
        z = np.abs(x.mean(0) - np.asarray(expected[name])) / error
        assert np.all(z < limit), (name, z)


EXACT = {
    "Exact": (no_latents, ebm.Exact),
    "Enumerated, event dimensions": (event_units, ebm.Enumerated),
    "Enumerated, hidden plate": (plate_units, ebm.Enumerated),
}
OBJECTIVES = {
    "SM": (3, lambda **o: ebm.ScoreMatching(**o)),
    "SSM": (3, lambda **o: ebm.SlicedScoreMatching(**o)),
    "SSM, 2 slices, sliced square": (
        3,
        lambda **o: ebm.SlicedScoreMatching(2, variance_reduction=False, **o),
    ),
    "DSM": (2, lambda **o: ebm.DenoisingScoreMatching(0.3, **o)),
    "DSM, no control variate": (
        2,
        lambda **o: ebm.DenoisingScoreMatching(0.3, variance_reduction=False, **o),
    ),
    "MDSM, linear": (2, lambda **o: ebm.MultiscaleDenoisingScoreMatching(0.3, **o)),
    "MDSM, geometric": (
        2,
        lambda **o: ebm.MultiscaleDenoisingScoreMatching(0.3, spacing="geometric", **o),
    ),
}


def test_every_objective_and_marginal_is_in_a_registry():
    covered = {type(make()).__name__ for _, make in OBJECTIVES.values()}
    assert covered == {n for n in ebm.__all__ if n.endswith("Matching")}
    assert {make().__class__ for _, make in EXACT.values()} == {ebm.Exact, ebm.Enumerated}


# Marginals


@pytest.mark.parametrize("name", EXACT)
def test_exact_marginals_equal_brute_force(name):
    model, marginal = EXACT[name]
    p, v = params64(), jnp.asarray(DATA)
    joint = read(model, (v,), {}, p)
    estimate = marginal().bind(KEY, joint, None, p, joint.unconstrain_visible())
    value = lambda p, v: estimate.log_density(p, {"v": v})  # noqa: E731
    brute = lambda p, v: jax.vmap(lambda v: log_marginal(p, v))(v)  # noqa: E731
    np.testing.assert_allclose(value(p, v), brute(p, v), rtol=1e-12)
    np.testing.assert_allclose(estimate.score({"v": v})["v"], score(p, v), rtol=1e-10)
    weights = jnp.asarray(RNG.normal(size=6))
    ours = jax.jacfwd(jax.grad(lambda p, v: weights @ value(p, v), 1))(p, v)
    theirs = jax.jacfwd(jax.grad(lambda p, v: weights @ brute(p, v), 1))(p, v)
    for key in p:
        np.testing.assert_allclose(ours[key], theirs[key], rtol=1e-9, atol=1e-12)


def test_enumeration_of_mixed_latents_equals_brute_force():
    """A three-valued site, a Bernoulli, a hidden plate and an event site, coupled."""

    def mixed(data):
        w = numpyro.param("w", 0.7)
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            a = numpyro.sample("a", ebm.Counting(3))
            g = numpyro.sample("g", dist.Bernoulli(0.3))
            e = numpyro.sample("e", ebm.Counting(2, (2,)))
            ebm.energy("E", 0.5 * (v - w * a) ** 2 - v * g * w - a * jnp.sum(e, -1) * 0.3)
            with numpyro.plate("units", 4, dim=-2):
                h = numpyro.sample("h", ebm.Counting(2))
                ebm.energy("E_h", -h * (0.2 * v + 0.1 * g))

    v = jnp.asarray([0.3, -1.2])
    total = []
    for a, g, e0, e1 in itertools.product(range(3), range(2), range(2), range(2)):
        log_p = jnp.log(0.3 if g else 0.7)
        energy = 0.5 * (v - 0.7 * a) ** 2 - v * g * 0.7 - a * (e0 + e1) * 0.3
        total.append(log_p - energy + 4 * softplus(0.2 * v + 0.1 * g))
    expected = jax.scipy.special.logsumexp(jnp.stack(total), axis=0)
    p = {"w": jnp.asarray(0.7)}
    joint = read(mixed, (v,), {}, p)
    estimate = ebm.Enumerated().bind(KEY, joint, None, p, {"v": v})
    np.testing.assert_allclose(estimate.log_density(p, {"v": v}), expected, rtol=1e-12)


def test_a_plate_of_a_hundred_units_factorises():
    def wide(data):
        w = numpyro.param("w", jnp.ones(100))
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            ebm.energy("E", 0.5 * v**2)
            with numpyro.plate("units", 100, dim=-2):
                h = numpyro.sample("h", ebm.Counting(2))
                ebm.energy("E_h", -h * w[:, None] * v)

    v, w = jnp.asarray([0.5, -1.0, 2.0]), jnp.linspace(-1, 1, 100)
    joint = read(wide, (v,), {}, {"w": w})
    estimate = ebm.Enumerated().bind(KEY, joint, None, {"w": w}, {"v": v})
    expected = jnp.sum(softplus(w[:, None] * v), 0) - 0.5 * v**2
    np.testing.assert_allclose(estimate.log_density({"w": w}, {"v": v}), expected, rtol=1e-12)


def guide_estimate(key, p, v, order=2, **options):
    joint = read(event_units, (v,), {}, p)
    guide = Guide(posterior, joint, (v,), {})
    return ebm.VaGES(**options).bind(key, joint, guide, p, {"v": v}, order=order)


@pytest.mark.parametrize("weighted", [False, True])
def test_vages_with_the_exact_posterior_is_unbiased_in_every_order(weighted):
    p, v = params64(), jnp.asarray(DATA)
    direction = jnp.asarray(RNG.normal(size=v.shape))

    def exact(p, v):
        return jnp.sum(jax.vmap(lambda v: log_marginal(p, v))(v))

    def derivatives(log_density):
        """∇_v, ∇_θ of a directional derivative, ∇_θ of a second directional derivative."""
        first = lambda p: jax.jvp(lambda v: log_density(p, v), (v,), (direction,))[1]  # noqa: E731

        def second(p):
            inner = lambda v: jax.jvp(lambda v: log_density(p, v), (v,), (direction,))[1]  # noqa: E731
            return jax.jvp(inner, (v,), (direction,))[1]

        out = {"score": jax.grad(log_density, 1)(p, v), "curvature": second(p)}
        out |= {"first " + k: x for k, x in jax.grad(first)(p).items()}
        return out | {"second " + k: x for k, x in jax.grad(second)(p).items()}

    def draw(key):
        estimate = guide_estimate(key, p, v, 3, num_particles=4, importance_weighted=weighted)
        out = derivatives(lambda p, v: jnp.sum(estimate.log_density(p, {"v": v})))
        return out | {"independent score": estimate.score({"v": v})["v"]}

    samples = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(2), 8_000))
    expected = derivatives(exact)
    assert_unbiased(samples, expected | {"independent score": expected["score"]}, limit=4.5)


def test_two_cumulants_are_not_enough_for_third_derivatives():
    p, v = params64(), jnp.asarray(DATA)

    def curvature(p, log_density):
        inner = lambda v: jax.jvp(lambda v: log_density(p, v), (v,), (jnp.ones_like(v),))[1]  # noqa: E731
        return jax.jvp(inner, (v,), (jnp.ones_like(v),))[1]

    def draw(key):
        estimate = guide_estimate(key, p, v, 2, num_particles=4)
        f = lambda p, v: jnp.sum(estimate.log_density(p, {"v": v}))  # noqa: E731
        return jax.grad(curvature)(p, f)["W"]

    exact = lambda p, v: jnp.sum(jax.vmap(lambda v: log_marginal(p, v))(v))  # noqa: E731
    samples = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(2), 4_000))
    z = (samples.mean(0) - jax.grad(curvature)(p, exact)["W"]) / (samples.std(0) / 4_000**0.5)
    assert jnp.max(jnp.abs(z)) > 8


def test_particles_are_hard_and_the_two_sets_differ():
    p, v = params64(), jnp.asarray(DATA)
    joint = read(event_units, (v,), {}, p)
    drawn = []

    class Spy(Guide):
        def draw(self, *args):
            drawn.append(super().draw(*args))
            return drawn[-1]

    ebm.VaGES(4).bind(KEY, joint, Spy(posterior, joint, (v,), {}), p, {"v": v})
    (h,) = (d["h"] for d in drawn)
    assert h.shape == (8, 6, 3) and jnp.issubdtype(h.dtype, jnp.integer)
    assert set(np.unique(h)) == {0, 1}
    assert not np.array_equal(h[:4], h[4:])


def test_one_shared_particle_set_is_biased():
    """The product of a score and its gradient from the same particles: off by many errors."""
    p, v = params64(), jnp.asarray(DATA)
    logits = p["c"] + v @ p["W"]

    def gradient(key, shared):
        keys = jax.random.split(key, 2)
        sets = [jax.random.bernoulli(k, sigmoid(logits), (2, 6, 3)) for k in keys]

        def surrogate(p, v, h):
            bowl = 0.5 * jnp.sum(((v - p["b"]) / p["scale"]) ** 2, -1)
            return cumulant_surrogate(h @ p["c"] + jnp.sum(v @ p["W"] * h, -1) - bowl, 2)

        z = jax.grad(lambda v: jnp.sum(surrogate(p, v, 1.0 * sets[1 if shared else 0])))(v)
        along = lambda p: jax.jvp(lambda v: surrogate(p, v, 1.0 * sets[1]), (v,), (z,))[1]  # noqa: E731
        return jax.grad(lambda p: jnp.mean(along(p)))(p)["W"]

    exact = jax.grad(lambda p: 0.5 * jnp.mean(jnp.sum(score(p, v) ** 2, -1)))(p)["W"]
    keys = jax.random.split(jax.random.key(3), 20_000)
    for shared in (False, True):
        samples = jax.jit(jax.vmap(lambda k, s=shared: gradient(k, s)))(keys)
        z = jnp.max(jnp.abs(samples.mean(0) - exact) / (samples.std(0) / 20_000**0.5))
        assert (z > 10) if shared else (z < 4)


def test_bias_grows_like_the_square_root_of_kl_and_stays_in_range_times_tv():
    """The expectations of VaES and VaGES under q, summed exactly over h; slope 0.5 ± 0.05."""
    W, b, c, s = (PARAMS[k] for k in ("W", "b", "c", "scale"))
    v = RNG.normal(size=(200, 2))
    logits = c + v @ W

    def log_q(logits):
        log_on, log_off = -np.logaddexp(0, -logits), -np.logaddexp(0, logits)
        return STATES @ log_on.T + (1 - STATES) @ log_off.T  # (states, rows)

    dv = STATES[:, None] @ W.T[None] - (v - b) / s**2  # ∇_v log p̃, (states, rows, 2)
    dW = v[None, :, :, None] * STATES[:, None, None, :]  # ∇_W log p̃
    d2 = np.eye(2)[:, :, None] * STATES[:, None, None, None, :]  # ∂_W ∇_v log p̃

    def expectations(weights):
        """E_q of the estimators: VaES, and VaGES, whose covariance is unbiased."""
        mean = lambda x: np.einsum("sr,sr...->r...", weights, x)  # noqa: E731
        vaes, mean_dW = mean(dv), mean(dW)
        second = np.einsum("sr,sri,srjk->rijk", weights, dv, dW)
        curvature = np.einsum("sr,sijk->rijk", weights, d2[:, 0])
        return vaes, curvature + second - np.einsum("ri,rjk->rijk", vaes, mean_dW)

    exact = np.exp(log_q(logits))
    vaes, vages = expectations(exact)
    np.testing.assert_allclose(vaes, score(params64(), jnp.asarray(v)), rtol=1e-9)
    jacobian = jax.jacfwd(lambda W: score({**params64(), "W": W}, jnp.asarray(v)))(jnp.asarray(W))
    np.testing.assert_allclose(vages, jacobian, rtol=1e-8, atol=1e-10)
    kl, bias = [], []
    for delta in (0.01, 0.02, 0.05, 0.1, 0.2, 0.4):
        perturbed = log_q(logits + delta * RNG.normal(size=logits.shape))
        q = np.exp(perturbed)
        kl.append(np.mean(np.sum(q * (perturbed - np.log(exact)), 0)))
        tv = 0.5 * np.sum(np.abs(q - exact), 0)
        a, g = expectations(q)
        assert np.all(np.abs(a - vaes) <= np.ptp(dv, axis=0) * tv[:, None] + 1e-12)
        bias.append(
            [
                np.mean(np.linalg.norm((x - y).reshape(200, -1), axis=1))
                for x, y in ((a, vaes), (g, vages))
            ]
        )
    for column in np.log(np.array(bias)).T:
        assert abs(np.polyfit(np.log(kl), column, 1)[0] - 0.5) < 0.05


def lateral(data, coupling=4.0):
    W, b, c, scale = declare()
    U = coupling * jnp.asarray([[0.0, 1.0, -1.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue((2,)), obs=data)
        h = numpyro.sample("h", ebm.Counting(2, (3,)))
        pairs = jnp.sum((h @ U) * h, -1)
        bowl = 0.5 * jnp.sum(((v - b) / scale) ** 2, -1)
        ebm.energy("E", bowl - h @ c - jnp.sum(v @ W * h, -1) - pairs)


def test_importance_weights_remove_most_of_the_bias_of_a_mean_field_guide():
    p, v = params64(), jnp.asarray(DATA)
    exact = jax.grad(
        lambda p: ebm.ScoreMatching().loss(KEY, p, lateral, None, v)  # Enumerated
    )(p)["W"]
    # The best factorised q for each row: its marginals, by enumeration.
    U = 4.0 * np.array([[0.0, 1.0, -1.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    log_w = (STATES @ PARAMS["c"] + np.sum(STATES @ U * STATES, 1))[:, None]
    log_w = log_w + STATES @ (DATA @ PARAMS["W"]).T
    w = np.exp(log_w - np.logaddexp.reduce(log_w, axis=0))
    marginals = np.clip(w.T @ STATES, 1e-3, 1 - 1e-3)

    def mean_field(data):
        with numpyro.plate("data", len(data)):
            probs = jnp.asarray(marginals) + 0.0 * jnp.sum(ebm.visible("v", data), -1)[:, None]
            numpyro.sample("h", dist.Bernoulli(probs).to_event(1))

    keys = jax.random.split(jax.random.key(5), 4_000)
    bias = {}
    for weighted in (False, True):
        marginal = ebm.VaGES(12, importance_weighted=weighted)
        loss = lambda p, k, m=marginal: ebm.ScoreMatching(m).loss(k, p, lateral, mean_field, v)  # noqa: E731
        gradients = jax.jit(jax.vmap(lambda k, f=loss: jax.grad(f)(p, k)["W"]))(keys)
        bias[weighted] = float(jnp.linalg.norm(gradients.mean(0) - exact))
    assert bias[False] > 0.05 * float(jnp.linalg.norm(exact))
    assert bias[True] < 0.3 * bias[False], bias


def test_vages_of_continuous_latents_matches_the_closed_form():
    """h ~ N(0, 1), v = w h + noise: log p(v) = log N(v; 0, w² + s²) up to log s."""

    def linear(data):
        w, s = numpyro.param("w", 1.0), numpyro.param("s", 1.0)
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            h = numpyro.sample("h", dist.Normal(0.0, 1.0))
            ebm.energy("E", 0.5 * ((v - w * h) / s) ** 2)

    def guide(data):
        w, s = numpyro.param("w", 1.0), numpyro.param("s", 1.0)
        with numpyro.plate("data", len(data)):
            v = ebm.visible("v", data)
            precision = 1 + w**2 / s**2
            numpyro.sample("h", dist.Normal(w * v / s**2 / precision, precision**-0.5))

    p = {"w": jnp.asarray(0.8), "s": jnp.asarray(0.6)}
    v = jnp.asarray([0.5, -1.0, 2.0])

    def exact(p, v):  # ½ s² - curvature of a Gaussian of variance w² + s²
        variance = p["w"] ** 2 + p["s"] ** 2
        return jnp.mean(0.5 * (v / variance) ** 2 - 1 / variance)

    objective = ebm.ScoreMatching(ebm.VaGES(4))
    draw = lambda k: jax.grad(lambda p: objective.loss(k, p, linear, guide, v))(p)  # noqa: E731
    samples = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(1), 20_000))
    assert_unbiased(samples, jax.grad(exact)(p, v))


# Objectives


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_are_the_same_on_every_exact_marginal(name):
    _, make = OBJECTIVES[name]
    p, v = params64(), jnp.asarray(DATA)
    results = [
        jax.value_and_grad(lambda p, m=model: make().loss(jax.random.key(3), p, m, None, v))(p)
        for model, _ in EXACT.values()
    ]
    for value, gradient in results[1:]:
        np.testing.assert_allclose(value, results[0][0], rtol=1e-10)
        for key in p:
            np.testing.assert_allclose(gradient[key], results[0][1][key], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_vages_objectives_are_unbiased_in_value_and_gradient(name):
    order, make = OBJECTIVES[name]
    p, v = params64(), jnp.asarray(DATA)

    def both(key):
        def evaluate(objective, model, guide):
            loss = lambda p: objective.loss(key, p, model, guide, v)  # noqa: E731
            value, gradient = jax.value_and_grad(loss)(p)
            return {"value": value, **gradient}

        noisy = evaluate(make(marginal=ebm.VaGES(order)), event_units, posterior)
        exact = evaluate(make(), no_latents, None)
        return jax.tree.map(jnp.subtract, noisy, exact)

    differences = jax.jit(jax.vmap(both))(jax.random.split(jax.random.key(4), 8_000))
    assert_unbiased(differences, {k: 0.0 for k in differences}, limit=4.5)


def test_score_matching_equals_its_formula():
    p, v = params64(), jnp.asarray(DATA)

    def formula(p):
        hessian = jax.vmap(lambda v: jax.hessian(log_marginal, 1)(p, v))(v)
        square = 0.5 * jnp.sum(score(p, v) ** 2, -1)
        return jnp.mean(square + jnp.trace(hessian, axis1=1, axis2=2))

    loss = lambda p: ebm.ScoreMatching().loss(KEY, p, event_units, None, v)  # noqa: E731
    np.testing.assert_allclose(loss(p), formula(p), rtol=1e-10)
    ours, theirs = jax.grad(loss)(p), jax.grad(formula)(p)
    for key in p:
        np.testing.assert_allclose(ours[key], theirs[key], rtol=1e-8)


@pytest.mark.parametrize("variance_reduction", [True, False])
def test_sliced_score_matching_averages_to_score_matching(variance_reduction):
    p, v = params64(), jnp.asarray(DATA)
    sliced = ebm.SlicedScoreMatching(3, variance_reduction=variance_reduction)
    evaluate = lambda o, k: jax.grad(lambda p: o.loss(k, p, no_latents, None, v))(p)  # noqa: E731
    samples = jax.jit(jax.vmap(lambda k: evaluate(sliced, k)))(jax.random.split(KEY, 4_000))
    assert_unbiased(samples, evaluate(ebm.ScoreMatching(), KEY), limit=4.5)


@pytest.mark.parametrize("variance_reduction", [True, False])
def test_denoising_equals_its_formula(variance_reduction):
    """Against E ½‖s(v + σε) + ε/σ‖², its expectation over ε by Gauss-Hermite quadrature."""
    sigma, p, v = 0.3, params64(), jnp.asarray(DATA)
    nodes, weights = np.polynomial.hermite_e.hermegauss(20)
    grid = jnp.asarray(list(itertools.product(nodes, nodes)))
    weights = jnp.asarray(np.outer(weights, weights).ravel() / (2 * np.pi))

    def formula(p):
        noised = lambda e: score(p, v + sigma * e) + e / sigma  # noqa: E731
        rows = jax.vmap(lambda e: 0.5 * jnp.sum(noised(e) ** 2, -1))(grid)
        return jnp.mean(weights @ rows)

    objective = ebm.DenoisingScoreMatching(sigma, variance_reduction=variance_reduction)

    def draw(key):
        loss = lambda p: objective.loss(key, p, no_latents, None, v)  # noqa: E731
        value, gradient = jax.value_and_grad(loss)(p)
        return {"value": value, **gradient}

    samples = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(6), 10_000))
    assert_unbiased(samples, {"value": formula(p), **jax.grad(formula)(p)})


def test_the_control_variate_takes_the_noise_off():
    p, v = params64(), jnp.asarray(DATA)
    spread = {}
    for reduce in (True, False):
        objective = ebm.DenoisingScoreMatching(0.01, variance_reduction=reduce)
        draw = lambda k, o=objective: jax.grad(lambda p: o.loss(k, p, no_latents, None, v))(p)  # noqa: E731
        samples = jax.jit(jax.vmap(draw))(jax.random.split(KEY, 500))
        spread[reduce] = float(samples["W"].std(0).max())
    assert spread[True] < 0.05 * spread[False]


def test_multiscale_with_one_level_is_denoising_rescaled():
    p, v = params64(), jnp.asarray(DATA)
    one = ebm.MultiscaleDenoisingScoreMatching(0.3, min_noise_scale=0.3, max_noise_scale=0.3)
    single = ebm.DenoisingScoreMatching(0.3, variance_reduction=False)
    draw = lambda o: lambda k: {"value": o.loss(k, p, no_latents, None, v)}  # noqa: E731
    keys = jax.random.split(KEY, 4_000)
    left, right = (jax.jit(jax.vmap(draw(o)))(keys)["value"] for o in (one, single))
    error = np.hypot(left.std(), right.std() / 0.09) / 4_000**0.5
    assert abs(left.mean() - right.mean() / 0.09) < 4 * error


@pytest.mark.parametrize("spacing", ["linear", "geometric"])
def test_noise_levels_are_stratified_and_free_of_the_position(spacing):
    objective = ebm.MultiscaleDenoisingScoreMatching(0.1, spacing=spacing)
    levels = jax.vmap(lambda k: objective.levels(k, 50))(jax.random.split(KEY, 2_000))
    u = (levels - 0.05) / 1.15 if spacing == "linear" else jnp.log(levels / 0.05) / jnp.log(24.0)
    assert jnp.all((u >= -1e-6) & (u <= 1 + 1e-6))
    strata = jnp.sort(jnp.floor(u * 50 * (1 - 1e-9)), axis=1)
    np.testing.assert_array_equal(strata, jnp.broadcast_to(jnp.arange(50.0), (2_000, 50)))
    assert jnp.all(jnp.abs(u.mean(0) - 0.5) < 4.5 * (1 / 12 / 2_000) ** 0.5)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_jit_equals_eager_and_rows_may_be_permuted(name):
    _, make = OBJECTIVES[name]
    p, v = params64(), jnp.asarray(DATA)
    loss = lambda v, k: make().loss(k, p, no_latents, None, v)  # noqa: E731
    np.testing.assert_allclose(jax.jit(loss)(v, KEY), loss(v, KEY), rtol=1e-10)
    keys = jax.random.split(jax.random.key(8), 2_000)
    one, other = (
        jax.jit(jax.vmap(lambda k, v=v: loss(v, k)))(keys)
        for v in (v, v[jnp.array([3, 1, 5, 0, 4, 2])])
    )
    error = np.hypot(one.std(), other.std()) / 2_000**0.5
    assert abs(one.mean() - other.mean()) < 4 * error + 1e-10


@pytest.mark.parametrize("name", OBJECTIVES)
def test_minimised_at_the_truth(name):
    """Data of N(0, 1/θ): the gradient vanishes at θ, smoothed by the noise where there is some."""
    _, make = OBJECTIVES[name]
    objective, theta = make(), 1.7
    data = jax.random.normal(jax.random.key(9), (40_000,)) / theta**0.5
    if isinstance(objective, ebm.MultiscaleDenoisingScoreMatching):
        objective = ebm.MultiscaleDenoisingScoreMatching(
            0.3, min_noise_scale=0.3, max_noise_scale=0.3, spacing=objective.spacing
        )
    noise = 0.09 if "DSM" in name else 0.0
    truth = 1 / (1 / theta + noise)

    def gaussian(data):
        precision = numpyro.param("precision", 1.0)
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            ebm.energy("E", 0.5 * precision * v**2)

    def gradient(precision, key, data):
        loss = lambda x: objective.loss(key, {"precision": x}, gaussian, None, data)  # noqa: E731
        return jax.grad(loss)(precision)

    keys = jax.random.split(KEY, 200)
    batches = data.reshape(200, 200)
    at = jax.jit(jax.vmap(gradient, (None, 0, 0)))
    here = at(jnp.asarray(truth), keys, batches)
    assert abs(here.mean()) < 4 * here.std() / 200**0.5
    assert at(jnp.asarray(0.7 * truth), keys, batches).mean() < 0
    assert at(jnp.asarray(1.4 * truth), keys, batches).mean() > 0


def test_the_scale_of_a_subsampled_plate_does_not_enter():
    def half(data):
        W, b, c, scale = declare()
        with numpyro.plate("data", 2 * len(data), subsample_size=len(data)):
            v = numpyro.sample("v", ebm.Lebesgue((2,)), obs=data)
            bowl = 0.5 * jnp.sum(((v - b) / scale) ** 2, -1)
            ebm.energy("E", bowl - jnp.sum(softplus(c + v @ W), -1))

    p, v = params64(), jnp.asarray(DATA)
    losses = [ebm.ScoreMatching().loss(KEY, p, m, None, v) for m in (half, no_latents)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-12)


def test_positive_supports_go_through_their_transform():
    """A log-normal written as an energy on v > 0 is a Gaussian in log v."""

    def log_normal(data):
        mu, s = numpyro.param("mu", 0.0), numpyro.param("s", 1.0)
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue((), dist.constraints.positive), obs=data)
            ebm.energy("E", 0.5 * ((jnp.log(v) - mu) / s) ** 2 + jnp.log(v))

    v = jnp.asarray([0.5, 1.0, 3.0])
    p = {"mu": jnp.asarray(0.2), "s": jnp.asarray(0.7)}
    expected = jnp.mean(0.5 * (jnp.log(v) - 0.2) ** 2 / 0.7**4 - 1 / 0.7**2)
    loss = ebm.ScoreMatching().loss(KEY, p, log_normal, None, v)
    np.testing.assert_allclose(loss, expected, rtol=1e-10)


def test_several_visible_sites_count_together():
    def pair(data, extra):
        W, b, c, scale = declare()
        with numpyro.plate("data", len(data)):
            x = numpyro.sample("x", ebm.Lebesgue(), obs=data)
            y = numpyro.sample("y", ebm.Lebesgue((1, 1)), obs=extra)
            v = jnp.stack([x, y[:, 0, 0]], -1)
            bowl = 0.5 * jnp.sum(((v - b) / scale) ** 2, -1)
            ebm.energy("E", bowl - jnp.sum(softplus(c + v @ W), -1))

    p, v = params64(), jnp.asarray(DATA)
    ours = ebm.ScoreMatching().loss(KEY, p, pair, None, v[:, 0], v[:, 1:, None])
    np.testing.assert_allclose(ours, ebm.ScoreMatching().loss(KEY, p, no_latents, None, v))


# Two players


def test_gradients_of_guide_and_energy_do_not_leak():
    """dL/dθ does not feel the guide's loss, and dL/dφ does not feel the energy's."""

    def guide(data):
        A, d = numpyro.param("A", jnp.zeros((2, 3))), numpyro.param("d", jnp.zeros(3))
        with numpyro.plate("data", len(data)):
            v = ebm.visible("v", data)
            numpyro.sample("h", dist.Bernoulli(logits=d + v @ A).to_event(1))

    p, v = params64(), jnp.asarray(DATA)
    phi = {"A": p["W"], "d": p["c"]}
    objective = ebm.DenoisingScoreMatching(0.3, marginal=ebm.VaGES(2))

    def draw(key):
        loss = lambda q: objective.loss(key, q, event_units, guide, v)  # noqa: E731
        exact = lambda q: ebm.DenoisingScoreMatching(0.3).loss(key, q, no_latents, None, v)  # noqa: E731
        gradient = jax.grad(loss)({**p, **phi})
        difference = {k: gradient[k] - g for k, g in jax.grad(exact)(p).items()}
        return difference | {k: gradient[k] for k in phi}

    samples = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(11), 8_000))
    assert_unbiased({k: samples[k] for k in p}, dict.fromkeys(p, 0.0), limit=4.5)
    # At the exact posterior the pathwise gradient of RelaxedELBO vanishes draw by draw.
    for k in phi:
        np.testing.assert_allclose(samples[k], 0.0, atol=1e-12)


def test_the_guide_is_fitted_at_the_noised_values():
    """A guide that reports the value it saw: the noised one, the same as the energy's."""
    seen = []

    def guide(data):
        A = numpyro.param("A", jnp.zeros((2, 3)))
        with numpyro.plate("data", len(data)):
            v = ebm.visible("v", data)
            seen.append(v)
            numpyro.sample("h", dist.Bernoulli(logits=v @ A).to_event(1))

    p, v = params64(), jnp.asarray(DATA)
    objective = ebm.DenoisingScoreMatching(0.5, marginal=ebm.VaGES(2), variance_reduction=False)
    problem = objective.pose(KEY, {**p, "A": jnp.zeros((2, 3))}, event_units, guide, (v,), {})
    del seen[:]
    from numpyro_ebm.objectives.guide_loss import row_guide_loss

    row_guide_loss(ebm.RelaxedELBO(), KEY, p, {"A": jnp.zeros((2, 3))}, problem, guide)
    objective.energy_loss(KEY, {**p, "A": jnp.zeros((2, 3))}, problem)
    noised = problem.unconstrained["v"]
    assert not np.allclose(noised, v, atol=0.05)
    for value in seen:
        np.testing.assert_array_equal(value, noised)


# Bad input


def test_bad_input_of_marginals_and_objectives():
    p, v = params64(), jnp.asarray(DATA)
    loss = lambda o, m, g=None: o.loss(KEY, p, m, g, v)  # noqa: E731
    with pytest.raises(ebm.ModelError, match="covariance of one particle"):
        ebm.VaGES(1)
    with pytest.raises(ebm.ModelError, match="needs a guide"):
        loss(ebm.DenoisingScoreMatching(0.1, ebm.VaGES()), event_units)
    with pytest.raises(ebm.ModelError, match="order 3.*VaGES.num_particles=3."):
        loss(ebm.ScoreMatching(ebm.VaGES(2)), event_units, posterior)
    with pytest.raises(ebm.ModelError, match="without latent sites.*Enumerated.*VaGES"):
        loss(ebm.ScoreMatching(ebm.Exact()), event_units)
    with pytest.raises(ebm.ModelError, match="max_states=4"):
        loss(ebm.ScoreMatching(ebm.Enumerated(max_states=4)), event_units)
    with pytest.raises(ebm.ModelError, match="no observed site"):
        ebm.ScoreMatching().loss(KEY, {}, lambda: hidden_only(), None)

    def discrete(data):
        w = numpyro.param("w", 1.0)
        with numpyro.plate("data", len(data)):
            x = numpyro.sample("x", ebm.Counting(2), obs=data)
            ebm.energy("E", -w * x)

    names = "PseudoLikelihood, RatioMatching, NCE, EnergyDiscrepancy or ContrastiveDivergence"
    for _, make in OBJECTIVES.values():
        with pytest.raises(ebm.ModelError, match=f"'x' is discrete.*{names}"):
            make().loss(KEY, {"w": 1.0}, discrete, None, jnp.array([0, 1]))
    for bad in (0.0, -1.0):
        with pytest.raises(ebm.ModelError, match="noise_scale"):
            ebm.DenoisingScoreMatching(bad)
    with pytest.raises(ebm.ModelError, match="num_slices"):
        ebm.SlicedScoreMatching(0)
    with pytest.raises(ebm.ModelError, match="spacing"):
        ebm.MultiscaleDenoisingScoreMatching(0.1, spacing="cubic")
    with pytest.raises(ebm.ModelError, match="marginal"):
        ebm.ScoreMatching("exact")


def hidden_only():
    with numpyro.plate("data", 2):
        v = numpyro.sample("v", ebm.Lebesgue())
        ebm.energy("E", v**2)
