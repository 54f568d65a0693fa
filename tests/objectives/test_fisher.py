# SPDX-License-Identifier: Apache-2.0
"""The Fisher divergence by a Stein critic, against closed forms."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import oracles
import pytest
from oracles import assert_unbiased, flat, jit

import numpyro_ebm as ebm
from numpyro_ebm.objectives import FisherDivergence


def critic(v):
    """tanh(v A + b): its divergence is known."""
    A = numpyro.param("A_critic", 0.3 * jnp.eye(v.shape[1]))
    b = numpyro.param("b_critic", jnp.zeros(v.shape[1]))
    return jnp.tanh(v @ A + b)


CRITIC = {
    "A_critic": np.array([[0.7, -0.3], [0.2, 0.5]]),
    "b_critic": np.array([0.1, -0.4]),
}
WEIGHT = {"critic_score_weight": np.array(0.6)}


def bracket(system, residual):
    """E[s·f + tr ∇f - ½‖f‖²] over the rows, with the trace exact, of all parameters."""

    def f(p, v):
        g = jnp.tanh(v @ p["A_critic"] + p["b_critic"])
        return g + p["critic_score_weight"] * system.score(p, v) if residual else g

    def row(p, v):
        value = f(p, v)
        trace = jnp.trace(jax.jacfwd(partial(f, p))(v))
        return system.score(p, v) @ value + trace - 0.5 * value @ value

    points = jnp.asarray(system.unconstrain(system.data))
    return lambda p: jnp.mean(jax.vmap(partial(row, p))(points))


SYSTEMS = {
    "Exact": (oracles.gaussian_system, ebm.Exact),
    "Enumerated": (oracles.grbm_system, ebm.Enumerated),
    "VaGES": (
        lambda **options: oracles.with_learned_guide(oracles.grbm_system(**options)),
        lambda: ebm.VaGES(3),
    ),
}


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("name", SYSTEMS)
def test_value_and_both_gradients_are_unbiased(name, residual, x64):
    """The energy goes down the bracket, the critic up; the guide is left to its own loss."""
    make, marginal = SYSTEMS[name]
    system = make(num_rows=3)
    objective = FisherDivergence(critic, marginal(), residual=residual)
    own = {**CRITIC, **(WEIGHT if residual else {})}
    params = jax.tree.map(jnp.asarray, {**system.params, **own})
    value, gradient = jit(jax.value_and_grad(bracket(system, residual)))(params)
    sign = {name: -1.0 if name in own else 1.0 for name in params}
    learned = [k for k in sorted(params) if k not in ("A", "d")]
    expected = flat((value, {k: sign[k] * gradient[k] for k in learned}))
    data = jnp.asarray(system.data)

    def of(rng_key):
        loss = lambda p: objective.loss(rng_key, p, system.model, system.guide, data)  # noqa: E731
        value, gradient = jax.value_and_grad(loss)(params)
        return value, {k: gradient[k] for k in learned}

    samples = oracles.draws(of, jax.random.key(0), 4_000)
    assert_unbiased(samples, np.asarray(expected), f"{name}, residual={residual}")


def test_the_best_critic_gives_half_the_mean_square_of_the_score_difference(x64):
    """For Gaussian data and model everything is linear, and the maximum is known."""
    precision = np.array([[2.0, 0.5], [0.5, 1.0]])
    mean = np.array([0.4, -0.2])
    params = {"mean": jnp.asarray(mean), "precision": jnp.asarray(precision)}
    data = np.random.default_rng(0).normal(size=(200_000, 2))
    truth = 0.5 * np.mean(np.sum(((data - mean) @ precision - data) ** 2, -1))
    objective = FisherDivergence(lambda v: v, ebm.Exact())
    best = {"critic_score_weight": jnp.array(1.0)}  # f = s + v is s - s_data
    loss = jit(partial(objective.loss, model=oracles.gaussian, guide=None))
    found = loss(jax.random.key(0), {**params, **best}, data=jnp.asarray(data))
    np.testing.assert_allclose(found, truth, atol=0.05)


def gaussian(data):
    precision = numpyro.param("precision", 1.0, constraint=dist.constraints.positive)
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(event_shape=(2,)), obs=data)
        ebm.energy("E", 0.5 * precision * jnp.sum(v**2, -1))


@pytest.mark.parametrize("precision", [1.0, 3.0])
def test_the_divergence_of_a_gaussian(precision):
    """½ (θ - 1)² d for N(0, I) data; at θ = 1 zero is within the error."""
    data = jax.random.normal(jax.random.key(0), (10_000, 2))
    found = ebm.fisher_divergence(
        jax.random.key(1),
        ebm.fixed(gaussian, {"precision": precision}),
        data,
        num_steps=600,
        num_looks=6,
        progress_bar=False,
    )
    truth = 0.5 * (precision - 1) ** 2 * 2
    assert abs(found.value - truth) <= 4 * found.standard_error + 0.03 * truth
    assert found.validation.shape == (6,)
    assert found.num_steps == 100 * (1 + np.argmax(found.validation))  # the best is reported
    assert "critic_slope" in found.params


def grbm_guide(data=None, *, num_visible, num_hidden):
    return ebm.models.grbm_guide(data, num_visible=num_visible, num_hidden=num_hidden)


def check_grbm(dimension, perturbation, num_steps, tolerance):
    keys = jax.random.split(jax.random.key(3), 3)
    params = {
        "W": perturbation * jax.random.normal(keys[0], (dimension, dimension)),
        "b": perturbation * jax.random.normal(keys[1], (dimension,)),
        "c": jnp.zeros(dimension),
        "scale": jnp.ones(dimension),
    }
    data = jax.random.normal(keys[2], (20_000, dimension))
    hidden = jax.nn.sigmoid(params["c"] + data @ params["W"])
    truth = 0.5 * jnp.mean(jnp.sum((params["b"] + hidden @ params["W"].T) ** 2, -1))
    found = ebm.fisher_divergence(
        jax.random.key(4),
        ebm.fixed(ebm.models.grbm, params),
        data,
        guide=grbm_guide,
        marginal=ebm.VaGES(2),
        num_steps=num_steps,
        guide_optim=optax.adam(2e-3),
        num_visible=dimension,
        num_hidden=dimension,
        progress_bar=False,
    )
    print(f"d = {dimension}, {perturbation}: {found.value} ± {found.standard_error} of {truth}")
    assert abs(found.value - truth) <= tolerance * truth + 3 * found.standard_error


@pytest.mark.slow
def test_a_model_with_latents_by_vages():
    check_grbm(8, 0.5, 1_500, 0.03)


@pytest.mark.slow
@pytest.mark.parametrize(("dimension", "perturbation"), [(50, 0.2), (50, 0.0), (200, 0.4)])
def test_larger_models_with_latents(dimension, perturbation):
    check_grbm(dimension, perturbation, 3_000, 0.02)


@pytest.mark.slow
def test_an_energy_is_learned_by_the_game():
    data = 0.5 * jax.random.normal(jax.random.key(5), (2_000, 2))
    objective = ebm.FisherDivergence(num_critic_steps=3, critic_optim=optax.adam(5e-3))
    svi = ebm.EnergySVI(gaussian, None, optax.adam(0.02), objective)
    fit = svi.run(jax.random.key(6), 600, data, batch_size=200, progress_bar=False)
    np.testing.assert_allclose(fit.params["precision"] * np.mean(data**2), 1.0, rtol=0.15)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ebm.FisherDivergence(critic=3.0), "`critic` must be a NumPyro function"),
        (lambda: ebm.FisherDivergence(num_critic_steps=0), "`num_critic_steps` must be a positive"),
        (
            lambda: ebm.fisher_divergence(jax.random.key(0), gaussian, jnp.ones((10, 2))),
            r"free parameter\(s\) \['precision'\].*fixed",
        ),
        (
            lambda: ebm.fisher_divergence(
                jax.random.key(0), gaussian, jnp.ones((10, 2)), test_fraction=1.0
            ),
            "leave rows to train on",
        ),
        (
            lambda: ebm.fisher_divergence(
                jax.random.key(0),
                ebm.fixed(gaussian, {"precision": 1.0}),
                jnp.ones((100, 2)),
                critic=lambda v: v[:, :1],
                progress_bar=False,
            ),
            r"the critic maps \(\d+, 2\) to \(\d+, 1\)",
        ),
        (
            lambda: ebm.FisherDivergence().loss(
                jax.random.key(0), {"precision": 1.0}, gaussian, None, jnp.ones((10, 2))
            ),
            "parameter.*'critic_weights_0'.*EnergySVI",
        ),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ebm.ModelError, match=f"(?s){message}"):
        make()
