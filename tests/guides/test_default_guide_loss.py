# SPDX-License-Identifier: Apache-2.0
"""Which guide loss is the default, what it sees, and where its gradient goes."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import oracles
import pytest
from guide_cases import GRBM_NAMES, LINEAR_NAMES, SOMEWHERE, arrays, loss_of, negative_elbo, split
from jax.nn import sigmoid, softplus
from numpyro.infer import Trace_ELBO, TraceGraph_ELBO
from oracles import assert_unbiased, draws, flat, jit

import numpyro_ebm as ebm
from numpyro_ebm.guides.losses import default_guide_loss, row_guide_loss

pytestmark = pytest.mark.usefixtures("x64")


def mixed_guide(data, *, num_hidden=3):
    with numpyro.plate("data", len(data)):
        v = ebm.visible("v", data)
        probs = jnp.stack([1 - sigmoid(v @ jnp.ones((2, 3))), sigmoid(v @ jnp.ones((2, 3)))], -1)
        numpyro.sample("h", dist.Categorical(probs).to_event(1))


def bit_and_state(data):
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        h, k = numpyro.sample("h", ebm.Counting(2)), numpyro.sample("k", ebm.Counting(3))
        ebm.energy("E", 0.5 * (v - h - k) ** 2)


def guide_of_both(data):
    with numpyro.plate("data", len(data)):
        v = ebm.visible("v", data)
        numpyro.sample("h", dist.Bernoulli(logits=v))
        numpyro.sample("k", dist.Categorical(logits=v[:, None] * jnp.arange(3.0)))


@pytest.mark.parametrize(
    ("system", "expected"),
    [
        (
            lambda: oracles.System(bit_and_state, guide_of_both, {}, np.ones(3), *[None] * 3),
            TraceGraph_ELBO,
        ),
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
