# SPDX-License-Identifier: Apache-2.0
"""VaGES with the exact posterior, and its bias with another guide."""

import itertools
import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import oracles
import pytest
from marginal_cases import bound, bowl, estimates, grbm_log_joint
from oracles import assert_unbiased, draws, flat, jit, z_scores
from registry.marginals import MARGINALS
from scipy.stats import kstat

import numpyro_ebm as ebm
from numpyro_ebm import marginals
from numpyro_ebm.marginals.vages import cumulant_surrogate

pytestmark = pytest.mark.usefixtures("x64")
UNBIASED = [name for name, marginal in MARGINALS.items() if marginal.system]


def test_every_marginal_is_in_the_registry():
    members = [getattr(marginals, name) for name in marginals.__all__]
    exported = {x for x in members if issubclass(x, marginals.Marginal)}
    assert {type(marginal.make()) for marginal in MARGINALS.values()} == exported
    tests = [x.read_text() for x in Path(__file__).parent.glob("test_*.py")]
    for name in set(MARGINALS) - set(UNBIASED):  # exact in a limit: they have tests of their own
        assert any(re.search(rf"\b{name}\(", text) for text in tests), name


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


@pytest.mark.slow
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


def test_weighted_particles_have_the_cumulants_of_their_law():
    """Many copies of three values of ∂δ: derivatives of log p̂ are cumulants at the weights."""
    p, slopes, copies = np.array([0.1, 0.3, 0.6]), np.array([0.0, 2.0, 1.0]), 40
    log_weights, particles = (jnp.asarray(np.repeat(x, copies)) for x in (np.log(p), slopes))

    def surrogate(theta):
        return cumulant_surrogate(theta * particles[:, None], 2, log_weights[:, None])[0]

    mean = p @ slopes
    np.testing.assert_allclose(jax.grad(surrogate)(0.7), mean, rtol=1e-10)
    second = jax.grad(jax.grad(surrogate))(0.7)
    np.testing.assert_allclose(second, p @ (slopes - mean) ** 2, rtol=3 / copies)


def test_particles_of_equal_weights_have_the_k_statistics():
    particles = jnp.array([0.0, 1.0, 3.0, 4.5, 4.0])
    derivative = lambda t: cumulant_surrogate(t * particles[:, None], 3, jnp.zeros((5, 1)))[0]  # noqa: E731
    for order in (1, 2, 3):
        derivative = jax.grad(derivative)
        np.testing.assert_allclose(derivative(0.7), kstat(particles, order), rtol=1e-10)


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


@pytest.mark.slow
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


def test_weights_take_away_the_bias_of_a_wrong_guide():
    """The score under a guide that is off by half a deviation, and wide: exact with the weights."""
    wrong = oracles.linear_guide(shift=0.5, noise=1.4)
    system = oracles.linear_system(num_rows=2)._replace(guide=wrong)
    params = jax.tree.map(jnp.asarray, system.params)
    expected = jax.vmap(system.score, (None, 0))(params, jnp.asarray(system.data))
    for weighted in (True, False):
        marginal = ebm.VaGES(100, importance_weighted=weighted)

        def score(key, marginal=marginal):
            estimate, point = bound(marginal, system, key, params)
            return estimate.score(point)["v"]

        found = jit(jax.vmap(score))(jax.random.split(jax.random.key(5), 400))
        gap = (found.mean(0) - expected) / (found.std(0) / 20)
        assert np.max(np.abs(gap)) < 6 if weighted else np.max(np.abs(gap)) > 30
