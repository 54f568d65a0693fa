# SPDX-License-Identifier: Apache-2.0
"""Laws of the objectives, over every member and marginal, against closed forms and quadrature."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax.nn import softplus

import numpyro_ebm as ebm

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
