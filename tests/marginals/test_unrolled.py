# SPDX-License-Identifier: Apache-2.0
"""The unrolled ratio against exact derivatives."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import oracles
import pytest
from jax.nn import sigmoid
from marginal_cases import DATA, bound
from numpyro.infer import Trace_ELBO
from oracles import draws, flat, jit

import numpyro_ebm as ebm

pytestmark = pytest.mark.usefixtures("x64")


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


@pytest.mark.slow
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


@pytest.mark.parametrize("num_steps, step_size", [(0, 0.3), (1, None), (4, 0.3)])
def test_unrolled_equals_steps_written_out(num_steps, step_size):
    """Every row has one of the eight derivatives that its latent state can give."""
    system = wrong_grbm_guide(3)
    marginal = ebm.Unrolled(num_steps, step_size=step_size, guide_loss=LogitDistance())
    step_size = 1.0 if step_size is None else step_size  # for discrete latents
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


@pytest.mark.slow
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


def test_a_relaxed_loss_keeps_its_temperature_where_its_path_is_not_derived():
    own = ebm.Unrolled(1, guide_loss=ebm.RelaxedELBO(0.7))._loss(None)
    assert own.temperature == 0.7 and not own.path_derivative
