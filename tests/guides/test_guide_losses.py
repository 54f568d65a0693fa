# SPDX-License-Identifier: Apache-2.0
"""Laws of the guide losses: their gradients, what they drive a guide to, and what they see."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import oracles
import pytest
from jax.nn import sigmoid, softplus
from numpyro.infer import Trace_ELBO, TraceGraph_ELBO
from oracles import assert_unbiased, draws, flat, jit

import numpyro_ebm as ebm
from numpyro_ebm.guides.losses import default_guide_loss, row_guide_loss

pytestmark = pytest.mark.usefixtures("x64")


def arrays(params):
    return jax.tree.map(jnp.asarray, params)


def bare_system(model, guide, params, data):
    """A model without the closed forms of a system."""
    return oracles.System(model, guide, params, data, None, None, None)


def split(system, model_names):
    """Parameters of the model, and of the guide."""
    own = {k: jnp.asarray(x) for k, x in system.params.items() if k in model_names}
    other = {k: jnp.asarray(x) for k, x in system.params.items() if k not in model_names}
    return own, other


def loss_of(guide_loss, system, model_names, objective=None):
    """The guide's loss at the clean data: (rng_key, guide parameters, weights) -> scalar."""
    objective = ebm.DenoisingScoreMatching(0.5, ebm.VaGES(2)) if objective is None else objective
    data = jnp.asarray(system.data)
    own, _ = split(system, model_names)

    def loss(rng_key, guide_params, weights=None):
        problem = objective.prepare(
            jax.random.key(0), {**own, **guide_params}, system.model, system.guide, (data,), {}
        )
        problem = problem._replace(
            unconstrained=problem.row_model.unconstrain_visible(), row_weights=weights
        )
        return row_guide_loss(guide_loss, rng_key, own, guide_params, problem, system.guide)

    return loss


def minimise(loss, guide_params, num_steps, step_size):
    """Adam with a step size that falls to zero."""
    optim = numpyro.optim.Adam(lambda i: step_size * jnp.maximum(0.0, 1 - i / num_steps))

    @jit
    def run(guide_params):
        def step(state, rng_key):
            gradient = jax.grad(lambda p: loss(rng_key, p))(optim.get_params(state))
            return optim.update(gradient, state), None

        keys = jax.random.split(jax.random.key(0), num_steps)
        return optim.get_params(jax.lax.scan(step, optim.init(guide_params), keys)[0])

    return run(guide_params)


# RelaxedELBO on Bernoulli latents


GRBM_NAMES = ("W", "b", "c", "scale")


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_relaxed_elbo_has_no_gradient_at_the_posterior_whatever_the_draw(temperature):
    system = oracles.with_learned_guide(oracles.grbm_system())
    loss = loss_of(ebm.RelaxedELBO(temperature), system, GRBM_NAMES)
    _, exact = split(system, GRBM_NAMES)
    gradients = draws(lambda key: jax.grad(lambda p: loss(key, p))(exact), jax.random.key(0), 50)
    np.testing.assert_allclose(gradients, 0.0, atol=1e-10)
    away = {**exact, "d": exact["d"] + 0.1}
    moved = draws(lambda key: jax.grad(lambda p: loss(key, p))(away), jax.random.key(0), 50)
    assert np.max(np.abs(moved)) > 1e-3


def test_relaxed_elbo_drives_a_guide_to_the_posterior():
    system = oracles.with_learned_guide(oracles.grbm_system(num_rows=100, seed=1))
    loss = loss_of(ebm.RelaxedELBO(0.5), system, GRBM_NAMES)
    found = minimise(loss, {"A": jnp.zeros((2, 3)), "d": jnp.zeros(3)}, 2_000, 0.05)
    np.testing.assert_allclose(found["A"], system.params["W"], atol=0.02)
    np.testing.assert_allclose(found["d"], system.params["c"], atol=0.02)


def test_relaxed_elbo_sums_over_hidden_plates_and_weighs_rows():
    """Its value, at weights of the rows, is that of the formula at the same logistic noise."""
    system = oracles.grbm_system(num_rows=3)

    def guide(data, *, num_hidden=3):
        A = numpyro.param("A", jnp.zeros((2, 3)))
        with numpyro.plate("data", len(data), dim=-1):
            v = ebm.visible("v", data)
            with numpyro.plate("hidden", 3, dim=-2):
                numpyro.sample("h", dist.Bernoulli(logits=(v @ A).T))

    A = jnp.asarray(np.random.default_rng(2).normal(size=(2, 3)))
    weights = jnp.array([0.5, 2.0, 3.0])
    plated = system._replace(model=oracles.grbm_plated, guide=guide)
    joined = system._replace(guide=oracles.learned_grbm_guide)
    values = []
    for case, extra in ((plated, {}), (joined, {"d": jnp.zeros(3)})):
        loss = loss_of(ebm.RelaxedELBO(0.7), case, GRBM_NAMES)
        samples = draws(
            lambda key, loss=loss, extra=extra: loss(key, {"A": A, **extra}, weights),
            jax.random.key(3),
            20_000,
        )
        values.append(samples[:, 0])
    u = jnp.linspace(1e-7, 1 - 1e-7, 200_001)
    logistic = jnp.log(u) - jnp.log1p(-u)
    p = arrays(system.params)

    def row(v):
        logits, field = v @ A, v @ p["W"] + p["c"]
        # Linear in h, unit by unit: its mean is all that matters.
        mean = jax.vmap(lambda x: jnp.mean(sigmoid((x + logistic) / 0.7)))(logits)
        energy = 0.5 * jnp.sum(((v - p["b"]) / p["scale"]) ** 2)
        return jnp.sum(mean * (logits - field) - softplus(logits)) + energy

    expected = np.mean(weights * jnp.stack([row(v) for v in jnp.asarray(system.data)]))
    for samples in values:
        assert_unbiased(samples[:, None], np.array([expected]), "relaxed ELBO")


PAIR = {"a": 0.4, "b": -0.8, "u": 2.5}


def pair_model(data):
    """Two coupled binary sites: p(h1, h2 | v) is proportional to exp(a h1 + b h2 + u h1 h2)."""
    numpyro.param("theta", 1.0)
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        h1 = numpyro.sample("h1", ebm.Counting())
        h2 = numpyro.sample("h2", ebm.Counting())
        field = PAIR["a"] * h1 + PAIR["b"] * h2 + PAIR["u"] * h1 * h2
        ebm.energy("E", 0.5 * v**2 - field)


def autoregressive_guide(data):
    p, q, r = (numpyro.param(name, 0.0) for name in "pqr")
    with numpyro.plate("data", len(data)):
        v = ebm.visible("v", data)
        h1 = numpyro.sample("h1", dist.Bernoulli(logits=p + 0.0 * v))
        numpyro.sample("h2", dist.Bernoulli(logits=q + r * h1))


def test_relaxed_elbo_drives_an_autoregressive_guide_to_the_posterior():
    """The gradient also flows from the later sites of the guide back through the earlier draws."""
    system = oracles.System(
        pair_model, autoregressive_guide, {"theta": 1.0}, np.zeros(200), *[None] * 3
    )
    loss = loss_of(ebm.RelaxedELBO(0.1), system, ("theta",))
    found = minimise(loss, dict.fromkeys("pqr", jnp.array(0.0)), 1_500, 0.05)
    a, b, u = PAIR.values()
    exact = {"p": a + softplus(b + u) - softplus(b), "q": b, "r": u}
    for name, value in exact.items():
        np.testing.assert_allclose(found[name], value, atol=0.1)


# Continuous latents: PosteriorScore and Trace_ELBO


LINEAR_NAMES = ("A", "b", "scale")

SOMEWHERE = {
    "B": np.array([[0.2, -0.3, 0.4], [0.5, 0.1, -0.2]]),
    "d": np.array([0.3, -0.4]),
    "std": np.array([0.6, 1.1]),
}


def posterior_score(p, guide_params, v):
    """½ E‖-ε/s + P (m + s ε - μ)‖² with q = N(m, s²) and the posterior N(μ, P⁻¹)."""
    mean, precision = oracles.linear_posterior(p, v)
    std = guide_params["std"]
    shift = precision @ (guide_params["B"] @ v + guide_params["d"] - mean)
    return 0.5 * jnp.sum(shift**2) + 0.5 * jnp.sum((precision * std - jnp.diag(1 / std)) ** 2)


def negative_elbo(p, guide_params, v):
    """KL(q ‖ p(h | v)) - log p̃(v), with the constants of the proper base measure of h."""
    mean, precision = oracles.linear_posterior(p, v)
    std = guide_params["std"]
    x = guide_params["B"] @ v + guide_params["d"] - mean
    trace = jnp.sum(jnp.diag(precision) * std**2)
    log_det = jnp.linalg.slogdet(precision)[1]
    kl = 0.5 * (trace + x @ precision @ x - 2 - log_det) - jnp.sum(jnp.log(std))
    return kl - oracles.linear_log_density(p, v)


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


# Other discrete latents: the score function


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


# Which loss is the default, what it sees, and where its gradient goes


def mixed_guide(data, *, num_hidden=3):
    with numpyro.plate("data", len(data)):
        v = ebm.visible("v", data)
        probs = jnp.stack([1 - sigmoid(v @ jnp.ones((2, 3))), sigmoid(v @ jnp.ones((2, 3)))], -1)
        numpyro.sample("h", dist.Categorical(probs).to_event(1))


@pytest.mark.parametrize(
    ("system", "expected"),
    [
        (lambda: oracles.with_learned_guide(oracles.grbm_system()), ebm.RelaxedELBO),
        (lambda: oracles.with_learned_guide(oracles.linear_system()), Trace_ELBO),
        (lambda: oracles.grbm_system()._replace(guide=mixed_guide), TraceGraph_ELBO),
    ],
)
def test_the_default_goes_by_the_latents(system, expected):
    system = system()
    problem = ebm.DenoisingScoreMatching(0.5, ebm.VaGES(2)).prepare(
        jax.random.key(0),
        arrays(system.params),
        system.model,
        system.guide,
        (jnp.asarray(system.data),),
        {},
    )
    assert type(default_guide_loss(problem)) is expected


def test_losses_refuse_latents_they_do_not_serve():
    system = oracles.grbm_system()._replace(guide=mixed_guide)
    with pytest.raises(ebm.ModelError, match="draws 'h' from .*Categorical.*TraceGraph_ELBO"):
        loss_of(ebm.RelaxedELBO(), system, GRBM_NAMES)(jax.random.key(0), {})
    system = oracles.with_learned_guide(oracles.grbm_system())
    _, guide_params = split(system, GRBM_NAMES)
    with pytest.raises(ebm.ModelError, match="draws of 'h' are not differentiable"):
        loss_of(ebm.PosteriorScore(), system, GRBM_NAMES)(jax.random.key(0), guide_params)
    with pytest.raises(ebm.ModelError, match="`temperature` must be positive, got 0"):
        ebm.RelaxedELBO(0)


def expected_guide_gradient(system, guide_params, levels, level_weights):
    """Gradient of the row average of E over noise and levels of (weight)·KL at the noised value."""
    own, _ = split(system, LINEAR_NAMES)
    x, w = np.polynomial.hermite_e.hermegauss(3)
    nodes = jnp.asarray(list(itertools.product(x, repeat=3)))
    node_weights = np.prod(list(itertools.product(w / w.sum(), repeat=3)), -1)

    def loss(q):
        at = lambda v, s, e: negative_elbo(own, q, v + s * e)  # noqa: E731
        rows = jax.vmap(jax.vmap(jax.vmap(at, (None, None, 0)), (None, 0, None)), (0, None, None))
        values = rows(jnp.asarray(system.data), levels, nodes)
        return jnp.mean(values @ node_weights @ level_weights)

    return jit(jax.grad(loss))(guide_params)


@pytest.mark.parametrize("name", ["DSM", "MDSM", "SM"])
def test_the_guide_is_fitted_at_the_value_the_objective_uses(name):
    """The loss's gradient in the guide's parameters, at a wrong guide, against its closed form."""
    marginal = ebm.VaGES(3)
    if name == "DSM":
        objective = ebm.DenoisingScoreMatching(1.0, marginal)
        levels, weights = jnp.array([1.0]), jnp.array([1.0])
    elif name == "SM":
        objective = ebm.ScoreMatching(marginal)
        levels, weights = jnp.array([0.0]), jnp.array([1.0])
    else:
        objective = ebm.MultiscaleDenoisingScoreMatching(
            0.5, marginal, min_noise_scale=0.5, max_noise_scale=1.5
        )
        levels, weights = oracles.level_quadrature(0.5, 1.5, "linear")
        weights = weights / levels
    system = oracles.with_learned_guide(oracles.linear_system(num_rows=3))
    own, _ = split(system, LINEAR_NAMES)
    where, data = arrays(SOMEWHERE), jnp.asarray(system.data)

    def gradient(rng_key):
        loss = lambda q: objective.loss(rng_key, {**own, **q}, system.model, system.guide, data)  # noqa: E731
        return jax.grad(loss)(where)

    expected = flat(expected_guide_gradient(system, where, levels, weights))
    assert_unbiased(draws(gradient, jax.random.key(9), 6_000), expected, name)


@pytest.mark.parametrize("kind", ["grbm", "linear"])
def test_the_losses_of_model_and_guide_do_not_mix(kind):
    """At a wrong guide: θ's gradient is the objective's alone, φ's the guide loss's alone."""
    system = oracles.with_learned_guide(getattr(oracles, kind + "_system")())
    names = GRBM_NAMES if kind == "grbm" else LINEAR_NAMES
    own, guide_params = split(system, names)
    guide_params = jax.tree.map(lambda x: x + 0.3, guide_params)
    objective = ebm.ScoreMatching(ebm.VaGES(3))  # nothing random but the particles
    data = jnp.asarray(system.data)
    args = system.model, system.guide, (data,), {}

    @jit
    def gradients(rng_key):
        loss = lambda p: objective.loss(rng_key, p, system.model, system.guide, data)  # noqa: E731
        return jax.value_and_grad(loss)({**own, **guide_params})

    @jit
    def energy(rng_key):
        everything = {**own, **guide_params}
        problem = objective.prepare(jax.random.key(0), everything, *args)
        loss = lambda p: objective.energy_loss(rng_key, p, problem)  # noqa: E731
        return jax.value_and_grad(loss)(everything)

    for seed in range(2):
        key = jax.random.key(seed)
        value, gradient = gradients(key)
        # The key of the particles is an implementation detail of `loss`: the second of three.
        energy_value, energy_gradient = energy(jax.random.split(key, 3)[1])
        np.testing.assert_allclose(value, energy_value, rtol=1e-10)
        for name in own:
            np.testing.assert_allclose(gradient[name], energy_gradient[name], rtol=1e-9)
        for name in guide_params:
            np.testing.assert_array_equal(energy_gradient[name], 0.0)
            assert np.max(np.abs(gradient[name])) > 1e-3


def test_every_run_of_the_guide_sees_the_noised_value():
    seen = []
    system = oracles.grbm_system()

    def guide(data, *, num_hidden=3):
        A = numpyro.param("A", jnp.zeros((2, 3)))
        with numpyro.plate("data", len(data)):
            v = ebm.visible("v", data)
            seen.append(v)
            numpyro.sample("h", dist.Bernoulli(logits=v @ A).to_event(1))

    objective = ebm.DenoisingScoreMatching(0.5, ebm.VaGES(2), variance_reduction=False)
    data, own = jnp.asarray(system.data), arrays(system.params)
    A = {"A": jnp.ones((2, 3))}

    @jit
    def run():
        args = system.model, guide, (data,), {}
        problem = objective.prepare(jax.random.key(0), {**own, **A}, *args)
        seen.clear()  # reading the guide is not using it
        objective.energy_loss(jax.random.key(1), {**own, **A}, problem)
        for guide_loss in (ebm.RelaxedELBO(), TraceGraph_ELBO()):
            row_guide_loss(guide_loss, jax.random.key(2), own, A, problem, guide)
        return problem.unconstrained["v"], list(seen)

    noised, values = run()
    assert np.min(np.abs(noised - data)) > 1e-4
    assert len(values) >= 3
    for v in values:
        np.testing.assert_array_equal(v, noised)


@pytest.mark.parametrize("name", ["RelaxedELBO", "TraceGraph_ELBO"])
def test_subsampling_does_not_change_the_scale_of_the_guide_loss(name):
    """Mean over subsampled rows of the guide's gradient: that of all the rows."""
    guide_loss = {"RelaxedELBO": ebm.RelaxedELBO(), "TraceGraph_ELBO": TraceGraph_ELBO()}[name]
    data = jnp.asarray(np.random.default_rng(12).normal(size=(8, 2)))
    W, A = jnp.asarray(oracles.GRBM["W"]), jnp.asarray(0.3 * np.ones((2, 3)))

    def plate():
        return numpyro.plate("data", 8, subsample_size=2)

    def model(data):
        W = numpyro.param("W", jnp.zeros((2, 3)))
        with plate() as rows:
            v = numpyro.sample("v", ebm.Lebesgue(event_shape=(2,)), obs=data[rows])
            h = numpyro.sample("h", ebm.Counting(event_shape=(3,)))
            ebm.energy("E", 0.5 * jnp.sum(v**2, -1) - jnp.sum((v @ W) * h, -1))

    def guide(data):
        A = numpyro.param("A", jnp.zeros((2, 3)))
        with plate() as rows:
            v = ebm.visible("v", data[rows])
            numpyro.sample("h", dist.Bernoulli(logits=v @ A).to_event(1))

    objective = ebm.ScoreMatching(ebm.VaGES(3))

    def gradient(rng_key):
        key_prepare, key_loss = jax.random.split(rng_key)
        problem = objective.prepare(key_prepare, {"W": W, "A": A}, model, guide, (data,), {})
        loss = lambda A: row_guide_loss(guide_loss, key_loss, {"W": W}, {"A": A}, problem, guide)  # noqa: E731
        return jax.grad(loss)(A)

    if name == "TraceGraph_ELBO":

        def formula(A):
            logits, field = data @ A, data @ W
            on = sigmoid(logits)
            return jnp.mean(jnp.sum(on * (logits - field) - softplus(logits), -1))

        expected = jax.grad(formula)(A)
    else:
        # The relaxed loss has its own mean; that of all rows at once is what subsampling must keep.
        u = jnp.linspace(1e-7, 1 - 1e-7, 200_001)
        logistic = jnp.log(u) - jnp.log1p(-u)

        def formula(A):
            logits, field = data @ A, data @ W
            mean = jax.vmap(jax.vmap(lambda x: jnp.mean(sigmoid((x + logistic) / 0.1))))(logits)
            return jnp.mean(jnp.sum(mean * jax.lax.stop_gradient(logits - field), -1))

        expected = jit(jax.grad(formula))(A)
    assert_unbiased(draws(gradient, jax.random.key(3), 6_000), np.ravel(expected), name)


@pytest.mark.parametrize("guide_loss", [TraceGraph_ELBO(), ebm.RelaxedELBO()])
def test_a_guide_may_use_parameters_of_the_model(guide_loss):
    """At their values, not where the guide declares that they start."""

    def model(data):
        W = numpyro.param("W", jnp.zeros(3))
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            h = numpyro.sample("h", ebm.Counting(event_shape=(3,)))
            ebm.energy("E", 0.5 * v**2 - jnp.sum(v[:, None] * W * h, -1))

    def guide(data):
        W, d = numpyro.param("W", jnp.zeros(3)), numpyro.param("d", jnp.zeros(3))
        with numpyro.plate("data", len(data)):
            v = ebm.visible("v", data)
            numpyro.sample("h", dist.Bernoulli(logits=v[:, None] * W + d).to_event(1))

    def own(data):
        d = numpyro.param("d", jnp.zeros(3))
        with numpyro.plate("data", len(data)):
            v = ebm.visible("v", data)
            numpyro.sample("h", dist.Bernoulli(logits=v[:, None] * params["W"] + d).to_event(1))

    params, data = {"W": jnp.array([2.0, -1.0, 0.5])}, jnp.array([0.3, -2.0, 1.5])
    objective = ebm.DenoisingScoreMatching(0.5, ebm.VaGES(2))
    gradients = []
    for q in (guide, own):
        start = {"d": jnp.full(3, 0.1)}
        problem = objective.prepare(jax.random.key(0), {**params, **start}, model, q, (data,), {})
        loss = lambda d: row_guide_loss(guide_loss, jax.random.key(1), params, d, problem, q)  # noqa: B023, E731
        gradients.append(jit(jax.grad(loss))(start)["d"])
    np.testing.assert_allclose(gradients[0], gradients[1], rtol=1e-12)
    assert np.all(gradients[0] != 0.0)
