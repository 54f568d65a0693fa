# SPDX-License-Identifier: Apache-2.0
"""Contrastive divergence: its gradient is the likelihood's where the chains are, and no further."""

import itertools
import pickle
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import oracles
import pytest
from jax import lax
from jax.nn import softplus
from jax.scipy.special import logsumexp
from numpyro.distributions import constraints
from numpyro.infer import SVI
from numpyro.infer.mcmc import MCMCKernel
from oracles import assert_unbiased, binary_states, draws, flat, jit

import numpyro_ebm as ebm
from numpyro_ebm.models import grbm_log_likelihood
from numpyro_ebm.objectives.persistent_chains import HISTORY, SPACING, Chains

KEY = jax.random.key(0)


def arrays(params):
    return jax.tree.map(jnp.asarray, params)


# Kernels that a test can see through


class DrawState(NamedTuple):
    z: dict
    rng_key: jax.Array


class Draw(MCMCKernel):
    """Ignores where it is, and draws from ``draw(rng_key, params, num_rows)``."""

    sample_field = "z"

    def __init__(self, model, draw):
        self.params, self.draw = model.params, draw

    def init(self, rng_key, num_warmup, init_params, model_args, model_kwargs):
        self.num_rows = len(init_params["v"])
        return DrawState(self.draw(rng_key, self.params, self.num_rows), rng_key)

    def sample(self, state, model_args, model_kwargs):
        rng_key, key_draw = jax.random.split(state.rng_key)
        return DrawState(self.draw(key_draw, self.params, self.num_rows), rng_key)


class Stay(MCMCKernel):
    """Does not move."""

    sample_field = "z"

    def __init__(self, model):
        pass

    def init(self, rng_key, num_warmup, init_params, model_args, model_kwargs):
        return DrawState(init_params, rng_key)

    def sample(self, state, model_args, model_kwargs):
        return state


def draw_gaussian(rng_key, p, num_rows):
    covariance = jnp.linalg.inv(0.5 * (p["precision"] + p["precision"].T))
    return {"v": jax.random.multivariate_normal(rng_key, p["mean"], covariance, (num_rows,))}


def draw_grbm(rng_key, p, num_rows, with_latents=False):
    """h from its enumerated law, v given h."""
    key_h, key_v = jax.random.split(rng_key)
    states = jnp.asarray(binary_states(len(p["c"])))
    h = states[jax.random.categorical(key_h, grbm_log_states(p), shape=(num_rows,))]
    noise = jax.random.normal(key_v, (num_rows, len(p["b"])))
    v = p["b"] + p["scale"] ** 2 * (h @ p["W"].T) + p["scale"] * noise
    return {"v": v, "h": h} if with_latents else {"v": v}


# What is known of the models


class Known(NamedTuple):
    """A model, and log Z (up to a constant) and E log p̃(v) under itself in closed form."""

    system: oracles.System
    log_z: object
    mean_log_density: float

    def law(self):
        """Value and gradient of the likelihood's own contrast, flattened."""
        system = self.system
        data = jnp.asarray(system.data)

        def nll(p):
            rows = jax.vmap(lambda v: system.log_density(p, v))(data)
            return self.log_z(p) - jnp.mean(rows)

        params = arrays(system.params)
        rows = jax.vmap(lambda v: system.log_density(params, v))(data)
        value = self.mean_log_density - jnp.mean(rows)
        return np.asarray(flat((value, jax.grad(nll)(params))))


def known_gaussian():
    def log_z(p):
        return -0.5 * jnp.linalg.slogdet(0.5 * (p["precision"] + p["precision"].T))[1]

    return Known(oracles.gaussian_system(), log_z, -1.0)


def grbm_log_states(p):
    h = binary_states(len(p["c"]))
    shift = h @ p["W"].T
    return h @ p["c"] + shift @ p["b"] + 0.5 * jnp.sum((shift * p["scale"]) ** 2, -1)


def known_grbm(**options):
    """E log p̃ by Gauss-Hermite quadrature over the components of the mixture."""
    system = oracles.grbm_system(**options)

    def log_z(p):
        return logsumexp(grbm_log_states(p)) + jnp.sum(jnp.log(p["scale"]))

    p = system.params
    x, w = np.polynomial.hermite_e.hermegauss(40)
    nodes = np.array(list(itertools.product(x, repeat=2)))
    weights = np.prod(np.array(list(itertools.product(w, repeat=2))), -1)
    means = p["b"] + p["scale"] ** 2 * (binary_states(3) @ p["W"].T)
    points = means[:, None] + p["scale"] * nodes
    values = softplus(p["c"] + points @ p["W"]).sum(-1)
    values = values - 0.5 * np.sum(((points - p["b"]) / p["scale"]) ** 2, -1)
    share = jax.nn.softmax(grbm_log_states(p))
    return Known(system, log_z, float(share @ np.asarray(values) @ weights / weights.sum()))


def known_linear():
    system = oracles.linear_system()
    peak = system.log_density(system.params, system.params["b"])
    return Known(system, lambda p: 3 * jnp.log(p["scale"]), float(peak) - 1.5)


def loss_draws(objective, system, num_draws, args=None, seed=1):
    """Value and gradient at many keys."""
    params = arrays(system.params)
    args = (jnp.asarray(system.data),) if args is None else args

    def one(key):
        def loss(p):
            return objective.loss(key, p, system.model, system.guide, *args)

        return jax.value_and_grad(loss)(params)

    return draws(one, jax.random.key(seed), num_draws)


# The gradient is unbiased for chains at equilibrium


EXACT_KERNEL = {
    "Exact": (known_gaussian, draw_gaussian, None),
    "Enumerated": (known_grbm, draw_grbm, ebm.Enumerated()),
    "Enumerated, latents": (known_grbm, partial(draw_grbm, with_latents=True), ebm.Enumerated()),
    "VaGES": (known_grbm, draw_grbm, ebm.VaGES()),
    "VaGES, latents": (known_grbm, partial(draw_grbm, with_latents=True), ebm.VaGES()),
    "Bound": (known_grbm, draw_grbm, ebm.ImportanceBound(2)),
    "Bound, latents": (known_grbm, partial(draw_grbm, with_latents=True), ebm.ImportanceBound(2)),
}
SLOW_HERE = ["Enumerated, latents", "VaGES", "Bound, latents"]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW_HERE)) for name in EXACT_KERNEL],
)
def test_gradient_of_the_likelihood_where_the_kernel_draws_from_the_model(name):
    """And the value is the difference of free energies, whoever stands for the latents."""
    make, draw, marginal = EXACT_KERNEL[name]
    known = make()
    objective = ebm.ContrastiveDivergence(partial(Draw, draw=draw), 1, marginal)
    assert_unbiased(loss_draws(objective, known.system, 5_000), known.law(), name)


LONG_CHAINS = {
    "Gaussian, MALA": (known_gaussian, partial(ebm.MALA, step_size=0.4), 60, None),
    "Gaussian, Gibbs": (known_gaussian, ebm.BlockGibbs, 1, None),
    "GRBM, MALA": (known_grbm, partial(ebm.MALA, step_size=0.3), 60, None),
    "GRBM, Gibbs": (known_grbm, ebm.BlockGibbs, 30, None),
    "GRBM, plated": (
        partial(known_grbm, model=oracles.grbm_plated, hidden_plate=True),
        ebm.BlockGibbs,
        30,
        ebm.VaGES(),
    ),
    "continuous latents": (known_linear, partial(ebm.MALA, step_size=0.12), 120, ebm.VaGES()),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name, marks=[pytest.mark.slow] * (name not in ("Gaussian, Gibbs", "GRBM, Gibbs"))
        )
        for name in LONG_CHAINS
    ],
)
def test_long_chains_have_the_gradient_of_the_likelihood(name):
    make, kernel, num_steps, marginal = LONG_CHAINS[name]
    known = make()
    objective = ebm.ContrastiveDivergence(kernel, num_steps, marginal)
    assert_unbiased(loss_draws(objective, known.system, 2_000), known.law(), name)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "draw, model, params, kernel",
    [
        pytest.param(
            draw_gaussian,
            oracles.gaussian,
            oracles.GAUSSIAN,
            partial(ebm.MALA, step_size=0.5),
            marks=pytest.mark.slow,
        ),
        (draw_grbm, oracles.grbm, oracles.GRBM, ebm.BlockGibbs),
    ],
)
def test_one_step_at_the_truth_has_a_gradient_of_mean_zero(draw, model, params, kernel):
    """Data from the model are at equilibrium, and stay there."""
    objective = ebm.ContrastiveDivergence(kernel)
    params = arrays(params)

    def one(key):
        key_data, key_loss = jax.random.split(key)
        data = draw(key_data, params, 4)["v"]
        return jax.value_and_grad(lambda p: objective.loss(key_loss, p, model, None, data))(params)

    samples = draws(one, KEY, 4_000)
    assert_unbiased(samples, np.zeros(samples.shape[1]), "stationary")


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_a_short_chain_has_not():
    """The test above sees a chain that has not arrived."""
    known = known_grbm()
    objective = ebm.ContrastiveDivergence(ebm.BlockGibbs)
    samples = loss_draws(objective, known.system, 2_000)
    assert np.max(np.abs(oracles.z_scores(samples, known.law()))) > 10


# Discrete visibles


RBM = {
    "W": np.random.default_rng(2).normal(size=(4, 3)),
    "b": np.array([0.3, -0.5, 0.2, -0.1]),
    "c": np.array([-0.2, 0.4, 0.1]),
}
BITS = np.array([[0, 0, 1, 1], [1, 1, 1, 0], [0, 1, 0, 0]])


def rbm(data=None):
    W = numpyro.param("W", jnp.zeros((4, 3)))
    b, c = numpyro.param("b", jnp.zeros(4)), numpyro.param("c", jnp.zeros(3))
    with numpyro.plate("data", 1 if data is None else len(data)):
        v = numpyro.sample("v", ebm.Counting(event_shape=(4,)), obs=data)
        h = numpyro.sample("h", ebm.Counting(event_shape=(3,)))
        ebm.energy("E", -v @ b - h @ c - jnp.sum((v @ W) * h, -1))


def rbm_plated(data=None):
    """Visible and hidden units in plates of their own, the rows last."""
    W = numpyro.param("W", jnp.zeros((4, 3)))
    b, c = numpyro.param("b", jnp.zeros(4)), numpyro.param("c", jnp.zeros(3))
    with numpyro.plate("data", 1 if data is None else len(data), dim=-1):
        with numpyro.plate("visible", 4, dim=-2):
            v = numpyro.sample("v", ebm.Counting(), obs=None if data is None else data.T)
        ebm.energy("E_v", -(b @ v))
        with numpyro.plate("hidden", 3, dim=-2):
            h = numpyro.sample("h", ebm.Counting())
            ebm.energy("E_h", -(W.T @ v + c[:, None]) * h)


def rbm_guide(data=None):
    with numpyro.plate("data", len(data)):
        v = ebm.visible("v", data)
        numpyro.sample("h", dist.Bernoulli(logits=v @ RBM["W"] + RBM["c"]).to_event(1))


def rbm_joint(p, v, h):
    """log p̃ at all pairs of rows of v and h."""
    return (v @ p["b"])[:, None] + h @ p["c"] + (v @ p["W"]) @ h.T


def rbm_free(p, v):
    return v @ p["b"] + jnp.sum(softplus(v @ p["W"] + p["c"]), -1)


def rbm_sweep(p, num_steps):
    """h given the data, v given h, ...: the law of (v, h), of shape (rows, 16, 8)."""
    v, h = binary_states(4), binary_states(3)
    table = np.asarray(rbm_joint(p, v, h))
    v_given_h = np.exp(table - np.logaddexp.reduce(table, axis=0))
    h_given_v = np.exp(table - np.logaddexp.reduce(table, axis=1, keepdims=True))
    at = (BITS[:, None] == v).all(-1).astype(float)
    for _ in range(num_steps):
        law = (at @ h_given_v)[:, None] * v_given_h
        at = law.sum(-1)
    return law


def rbm_expected(num_steps, latents):
    """Value and gradient of CD-k, everything random summed out."""
    law = rbm_sweep(RBM, num_steps)
    v, h = binary_states(4), binary_states(3)

    def contrast(p, latents):
        negative = rbm_joint(p, v, h) if latents else rbm_free(p, v)[:, None]
        return jnp.mean(jnp.sum(law * negative, (1, 2)) - rbm_free(p, BITS))

    params = arrays(RBM)
    return flat((contrast(params, False), jax.grad(contrast)(params, latents)))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "model, marginal, num_steps",
    [
        (rbm, None, 1),
        pytest.param(rbm, ebm.VaGES(), 1, marks=pytest.mark.slow),
        pytest.param(rbm_plated, None, 1, marks=pytest.mark.slow),
        pytest.param(rbm, None, 2, marks=pytest.mark.slow),
        pytest.param(rbm, ebm.VaGES(), 2, marks=pytest.mark.slow),
    ],
)
def test_a_sweep_draws_the_latents_before_the_visibles(model, marginal, num_steps):
    """Else CD-1 would forget the data. Latents of the kernel serve where none are summed out."""
    guide = None if marginal is None else rbm_guide
    system = oracles.System(model, guide, RBM, BITS, None, None, None)
    objective = ebm.ContrastiveDivergence(ebm.BlockGibbs, num_steps, marginal)
    expected = rbm_expected(num_steps, marginal is not None)
    assert_unbiased(loss_draws(objective, system, 4_000), expected, f"CD-{num_steps}")


def rbm_law():
    """The likelihood's."""
    states = binary_states(4)
    params = arrays(RBM)

    def nll(p):
        return logsumexp(rbm_free(p, states)) - jnp.mean(rbm_free(p, BITS))

    share = jax.nn.softmax(rbm_free(params, states))
    value = share @ rbm_free(params, states) - jnp.mean(rbm_free(params, BITS))
    return flat((value, jax.grad(nll)(params)))


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("marginal", [None, ebm.VaGES()])
def test_long_chains_of_a_binary_rbm(marginal):
    guide = None if marginal is None else rbm_guide
    system = oracles.System(rbm, guide, RBM, BITS, None, None, None)
    objective = ebm.ContrastiveDivergence(ebm.BlockGibbs, 60, marginal)
    assert_unbiased(loss_draws(objective, system, 2_000), rbm_law(), "RBM")


ISING = {"J": np.array([0.9, -0.6, 0.4, 0.7]), "field": np.array([0.3, -0.2, 0.1, -0.4])}


def ising_log_density(p, bits):
    spins = 2.0 * bits - 1.0
    return spins @ p["field"] + (spins * jnp.roll(spins, -1, -1)) @ p["J"]


def ising(data=None):
    p = {name: numpyro.param(name, jnp.zeros(4)) for name in ISING}
    with numpyro.plate("data", 1 if data is None else len(data)):
        v = numpyro.sample("v", ebm.Counting(event_shape=(4,)), obs=data)
        ebm.energy("E", -ising_log_density(p, v))


@pytest.mark.usefixtures("x64")
def test_long_chains_of_an_ising_ring():
    states = binary_states(4)

    def nll(p):
        return logsumexp(ising_log_density(p, states)) - jnp.mean(ising_log_density(p, BITS))

    params = arrays(ISING)
    log_density = ising_log_density(params, states)
    value = jax.nn.softmax(log_density) @ log_density - jnp.mean(ising_log_density(params, BITS))
    system = oracles.System(ising, None, ISING, BITS, None, None, None)
    objective = ebm.ContrastiveDivergence(ebm.BlockGibbs, 30)
    samples = loss_draws(objective, system, 2_000)
    assert_unbiased(samples, flat((value, jax.grad(nll)(params))), "Ising")


# Rows: subsampled, with covariates


@pytest.mark.usefixtures("x64")
def test_a_data_plate_with_a_subsample_of_its_own():
    """In the mean over batches the gradient is that of all rows, on the scale of one."""
    known = known_gaussian()
    data = np.random.default_rng(3).normal(size=(20, 2))

    def model(data):
        mean, precision = (
            numpyro.param("mean", jnp.zeros(2)),
            numpyro.param("precision", jnp.eye(2)),
        )
        with numpyro.plate("data", 20, subsample_size=5):
            v = numpyro.sample(
                "v", ebm.Lebesgue(event_shape=(2,)), obs=numpyro.subsample(data, event_dim=1)
            )
            x = v - mean
            ebm.energy("E", 0.5 * jnp.sum((x @ precision) * x, -1))

    known = known._replace(system=known.system._replace(model=model, data=data))
    objective = ebm.ContrastiveDivergence(ebm.BlockGibbs)
    assert_unbiased(loss_draws(objective, known.system, 4_000), known.law(), "subsample")
    still = loss_draws(ebm.ContrastiveDivergence(Stay), known.system, 3)
    # The chains start at the batch, not at another.
    np.testing.assert_allclose(still, 0.0, atol=1e-14)


def regression(x, data):
    w = numpyro.param("w", jnp.array(0.0))
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", 0.5 * jnp.exp(w * x) * (v - w * x) ** 2)


@pytest.mark.usefixtures("x64")
def test_covariates_stay_with_their_rows():
    x, data = np.random.default_rng(0).normal(size=(2, 7))

    def energy(w):
        return 0.5 * jnp.exp(w * x) * (data - w * x) ** 2

    def nll(p):
        return jnp.mean(energy(p["w"]) - 0.5 * p["w"] * x)

    params = {"w": jnp.array(0.7)}
    expected = flat((jnp.mean(energy(0.7)) - 0.5, jax.grad(nll)(params)))
    system = oracles.System(regression, None, params, None, None, None, None)
    objective = ebm.ContrastiveDivergence(ebm.BlockGibbs)
    args = jnp.asarray(x), jnp.asarray(data)
    assert_unbiased(loss_draws(objective, system, 4_000, args), expected, "covariates")


# Persistent chains


def advanced(objective, model, params, data, num_rounds, guide=None):
    """The chains after some rounds at fixed parameters."""
    params = arrays(params)

    def run(key):
        problem = objective.prepare(key, params, model, guide, (jnp.asarray(data),), {})
        chains = objective.init_state(key, params, problem)

        def one(chains, key):
            return objective.advance(key, params, problem, chains)[1], None

        return lax.scan(one, chains, jax.random.split(key, num_rounds))[0]

    return jit(run)(KEY)


def as_state(chains):
    return SimpleNamespace(objective_state=chains)


@pytest.fixture(scope="module")
def many_chains():
    """Chains of a GRBM from far away, 100 rounds of one sweep."""
    data = np.tile(np.array([[9.0, -9.0], [-5.0, 5.0]]), (1_000, 1))
    objective = ebm.ContrastiveDivergence(ebm.BlockGibbs, persistent=True)
    return objective, advanced(objective, oracles.grbm, oracles.GRBM, data, 100)


def test_persistent_chains_arrive_at_the_model(many_chains):
    _, chains = many_chains
    p = oracles.GRBM
    share = np.asarray(jax.nn.softmax(grbm_log_states(p)))
    states = binary_states(3)
    means = p["b"] + p["scale"] ** 2 * (states @ p["W"].T)
    second = np.einsum("s,si,sj->ij", share, means, means) + np.diag(p["scale"] ** 2)
    v, h = np.asarray(chains.position["v"], float), np.asarray(chains.position["h"], float)
    expected = np.concatenate([share @ means, second.ravel(), share @ states])
    products = np.einsum("ni,nj->nij", v, v).reshape(len(v), -1)
    assert_unbiased(np.concatenate([v, products, h], -1), expected, "persistent chains")


def test_the_history_is_of_every_fourth_round(many_chains):
    _, chains = many_chains
    assert int(chains.count) == 100 and chains.history.shape == (HISTORY, 2_000, 3)
    latest = chains.history[100 // SPACING - 1]
    np.testing.assert_array_equal(latest[:, :2], chains.position["v"])
    v = jnp.asarray(chains.position["v"])
    energy = -jax.vmap(lambda v: oracles.grbm_log_density(oracles.GRBM, v))(v)
    np.testing.assert_allclose(latest[:, 2], energy, rtol=1e-4, atol=1e-4)


def test_chains_that_mix_have_an_r_hat_of_one(many_chains):
    objective, chains = many_chains
    r_hat = objective.chain_diagnostics(as_state(chains))
    assert r_hat["visible"].shape == (2,) and np.ndim(r_hat["energy"]) == 0
    assert np.all(r_hat["visible"] < 1.1) and r_hat["energy"] < 1.1


def two_wells(data):
    depth = numpyro.param("depth", jnp.array(50.0))
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", depth * (v**2 - 1) ** 2)


def test_chains_in_two_modes_have_a_large_r_hat():
    """The energies of the modes agree; the visible values do not."""
    objective = ebm.ContrastiveDivergence(partial(ebm.MALA, step_size=2e-3), 20, persistent=True)
    chains = advanced(objective, two_wells, {"depth": 50.0}, np.repeat([-1.0, 1.0], 10), 40)
    r_hat = objective.chain_diagnostics(as_state(chains))
    assert r_hat["visible"][0] > 3 and r_hat["energy"] < 1.3


@pytest.mark.parametrize(
    "marginal", [ebm.VaGES(), pytest.param(ebm.ImportanceBound(3), marks=pytest.mark.slow)]
)
def test_diagnostics_without_an_exact_marginal(marginal):
    """The guide's bound stands for the energy, exact here."""
    objective = ebm.ContrastiveDivergence(
        partial(Draw, draw=draw_grbm), 1, marginal, persistent=True
    )
    system = oracles.grbm_system()
    chains = advanced(objective, system.model, system.params, system.data, 20, system.guide)
    v = chains.position["v"]
    energy = -jax.vmap(lambda v: oracles.grbm_log_density(oracles.GRBM, v))(v)
    np.testing.assert_allclose(
        chains.history[20 // SPACING - 1][:, 2], energy, rtol=1e-4, atol=1e-4
    )
    assert objective.chain_diagnostics(as_state(chains))["energy"] < 1.5


def test_diagnostics_need_chains_and_rounds():
    objective = ebm.ContrastiveDivergence(Stay, persistent=True)
    chains = Chains({"v": jnp.zeros(3)}, jnp.zeros((HISTORY, 3, 2)), jnp.array(15))
    with pytest.raises(ebm.ModelError, match="at least 16 rounds, there were 15"):
        objective.chain_diagnostics(as_state(chains))
    with pytest.raises(ebm.ModelError, match="holds no persistent chains"):
        objective.chain_diagnostics(as_state(None))


def one_round(objective, system, chains, data, key=KEY):
    """The negative phase of a round: positions of the chains."""
    params = arrays(system.params)
    problem = objective.prepare(KEY, params, system.model, None, (jnp.asarray(data),), {})
    return objective.advance(key, params, problem, chains)[0].noise


def test_chains_that_all_restart_are_those_of_contrastive_divergence():
    """Bit for bit: what is left of the old latents is overwritten by a sweep."""
    system = oracles.grbm_system(num_rows=50)
    far = Chains(
        {"v": jnp.full((50, 2), 100.0), "h": jnp.ones((50, 3), int)},
        jnp.zeros((HISTORY, 50, 3)),
        jnp.array(0),
    )
    reset = ebm.ContrastiveDivergence(ebm.BlockGibbs, 2, persistent=True, reset_probability=1.0)
    plain = ebm.ContrastiveDivergence(ebm.BlockGibbs, 2)
    with_reset = jit(lambda far: one_round(reset, system, far, system.data))(far)
    without = jit(lambda: one_round(plain, system, None, system.data))()
    np.testing.assert_array_equal(with_reset["v"], without["v"])
    np.testing.assert_array_equal(with_reset["h"], without["h"])


@pytest.mark.parametrize("model", [rbm, rbm_plated])
def test_a_share_of_the_rows_restarts(model):
    """Whole rows, whichever axis they are on."""
    num = 1_000
    data = np.zeros((num, 4), int)
    old = jnp.ones((4, num) if model is rbm_plated else (num, 4), int)
    chains = Chains({"v": old}, jnp.zeros((HISTORY, num, 5)), jnp.array(0))
    system = oracles.System(model, None, RBM, data, None, None, None)
    objective = ebm.ContrastiveDivergence(Stay, persistent=True, reset_probability=0.5)
    v = np.asarray(jit(lambda chains: one_round(objective, system, chains, data))(chains)["v"])
    v = v.T if model is rbm_plated else v
    assert np.all(v == v[:, :1])
    assert abs(np.sum(v[:, 0] == 0) - num / 2) < 4.5 * np.sqrt(num / 4)


# Training


def assert_same(left, right):
    for x, y in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(x, y)


def persistent_svi(**options):
    objective = ebm.ContrastiveDivergence(ebm.BlockGibbs, persistent=True, **options)
    return ebm.EnergySVI(oracles.grbm, None, optax.adam(1e-2), objective)


ROWS = jnp.asarray(np.random.default_rng(5).normal(size=(60, 2)), jnp.float32)


@pytest.fixture(scope="module")
def persistent_run():
    svi = persistent_svi(reset_probability=0.1)
    return svi, svi.run(KEY, 24, ROWS, batch_size=20, progress_bar=False)


def test_chains_are_part_of_the_training_state(persistent_run):
    svi, fit = persistent_run
    chains = fit.state.objective_state
    assert chains.position["v"].shape == (20, 2) and chains.position["h"].shape == (20, 3)
    assert chains.history.shape == (HISTORY, 20, 3) and int(chains.count) == 24
    records = 24 // SPACING
    assert np.all(np.std(chains.history[:records], 1) > 0)
    assert np.all(chains.history[records:] == 0)
    r_hat = svi.loss.chain_diagnostics(fit.state)
    assert np.isfinite(r_hat["visible"]).all() and np.isfinite(r_hat["energy"])


def test_resuming_equals_one_long_run_bit_for_bit(persistent_run):
    svi, whole = persistent_run
    first = svi.run(KEY, 10, ROWS, batch_size=20, progress_bar=False)
    again = persistent_svi(reset_probability=0.1)  # as after a restart
    state = pickle.loads(pickle.dumps(first.state))
    second = again.run(
        jax.random.key(9), 14, ROWS, batch_size=20, init_state=state, progress_bar=False
    )
    assert_same(whole.state, second.state)
    np.testing.assert_array_equal(whole.losses, jnp.concatenate([first.losses, second.losses]))


def test_another_batch_size_raises(persistent_run):
    svi, fit = persistent_run
    with pytest.raises(ebm.ModelError, match="holds 20 persistent chains.*has 30 rows"):
        svi.run(KEY, 1, ROWS, batch_size=30, init_state=fit.state, progress_bar=False)


def test_evaluate_looks_at_the_next_round_and_changes_nothing(persistent_run, stable_update):
    svi, fit = persistent_run
    before = jax.tree.map(jnp.copy, fit.state)
    loss = jit(svi.evaluate)(fit.state, ROWS[:20])
    assert_same(before, fit.state)
    new_state, next_loss = stable_update(fit.state, ROWS[:20])
    np.testing.assert_allclose(loss, next_loss, rtol=1e-5)
    old, new = fit.state.objective_state, new_state.objective_state
    assert int(new.count) == int(old.count) + 1
    assert not np.array_equal(new.position["v"], old.position["v"])


@pytest.fixture(scope="module")
def stable_update(persistent_run):
    return jit(persistent_run[0].stable_update)


def test_stable_update_keeps_the_chains_too(persistent_run, stable_update):
    _, fit = persistent_run
    # A batch from another world: the chains stay as well as the parameters.
    kept, loss = stable_update(fit.state, jnp.full((20, 2), jnp.inf))
    assert np.isnan(loss)
    assert_same(kept, fit.state)


def test_init_and_update_without_run():
    svi = persistent_svi()
    state = svi.init(KEY, ROWS)
    assert state.objective_state.position["v"].shape == (60, 2)
    assert int(state.objective_state.count) == 0


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_continuous_latents_with_a_guide_that_learns():
    """MALA moves v and h together; chains are remembered in unconstrained coordinates."""
    system = oracles.with_learned_guide(oracles.linear_system())
    kernel = partial(ebm.MALA, step_size=0.05)
    objective = ebm.ContrastiveDivergence(kernel, 3, ebm.VaGES(), persistent=True)
    svi = ebm.EnergySVI(system.model, system.guide, optax.adam(1e-2), objective)
    data = jnp.asarray(system.data)
    state = svi.init(KEY, data)
    new_state, loss = jit(svi.update)(state, data)
    assert np.isfinite(loss)
    assert set(new_state.objective_state.position) == {"v", "h"}
    before, after = svi.get_params(state), svi.get_params(new_state)
    for name, x in after.items():
        assert np.isfinite(x).all() and not np.allclose(x, before[name]), name


def gaussian(data):
    precision = numpyro.param("precision", 1.0, constraint=constraints.positive)
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", 0.5 * precision * v**2)


def test_numpyros_svi_trains_without_persistent_chains():
    data = 0.5 * jax.random.normal(KEY, (1_000,))
    objective = ebm.ContrastiveDivergence(partial(ebm.MALA, step_size=0.2), 3)
    optim = optax.adam(optax.exponential_decay(0.1, 100, 0.3))
    svi = SVI(gaussian, lambda data: None, optim, objective)
    fit = svi.run(jax.random.key(1), 300, data, progress_bar=False)
    np.testing.assert_allclose(fit.params["precision"], 1 / jnp.mean(data**2), rtol=0.05)


def test_numpyros_svi_has_no_place_for_persistent_chains():
    objective = ebm.ContrastiveDivergence(ebm.BlockGibbs, persistent=True)
    svi = SVI(gaussian, lambda data: None, optax.adam(0.1), objective)
    with pytest.raises(ebm.ModelError, match="keeps a state.*numpyro_ebm.EnergySVI"):
        svi.run(KEY, 2, jnp.arange(3.0), progress_bar=False)


def with_support(data):
    rate = numpyro.param("rate", 1.0, constraint=constraints.positive)
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(support=constraints.positive), obs=data)
        ebm.energy("E", rate * v)


@pytest.mark.slow
def test_persistent_chains_on_another_support():
    """Chains live in unconstrained coordinates: an exponential's rate, one over the mean."""
    data = jax.random.exponential(KEY, (500,)) / 3.0
    kernel = partial(ebm.MALA, step_size=0.5)
    objective = ebm.ContrastiveDivergence(kernel, 3, persistent=True)
    optim = optax.adam(optax.exponential_decay(0.1, 100, 0.3))
    svi = ebm.EnergySVI(with_support, None, optim, objective)
    fit = svi.run(jax.random.key(1), 300, data, progress_bar=False)
    np.testing.assert_allclose(fit.params["rate"], 1 / jnp.mean(data), rtol=0.15)
    assert np.any(fit.state.objective_state.position["v"] < 0)


# Errors


@pytest.mark.parametrize(
    "kernel",
    [ebm.BlockGibbs(ebm.fixed(gaussian, {"precision": 1.0})), "MALA", None],
)
def test_the_kernel_is_a_function_of_a_model(kernel):
    with pytest.raises(ebm.ModelError, match=r"function from a model to a kernel.*partial\(MALA"):
        ebm.ContrastiveDivergence(kernel)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_steps": 0}, "`num_steps` must be a positive integer"),
        ({"num_steps": 1.5}, "`num_steps` must be a positive integer"),
        ({"reset_probability": 0.1}, "without `persistent=True`"),
        ({"reset_probability": 1.1, "persistent": True}, "between 0 and 1"),
        ({"marginal": "VaGES"}, "`marginal` must be a marginal"),
    ],
)
def test_arguments_are_checked(options, message):
    with pytest.raises(ebm.ModelError, match=message):
        ebm.ContrastiveDivergence(ebm.BlockGibbs, **options)


def loss_of(objective, model, *args, params=None):
    return objective.loss(KEY, {} if params is None else params, model, None, *args)


def test_a_kernel_that_is_none_raises():
    objective = ebm.ContrastiveDivergence(lambda model: model)
    with pytest.raises(ebm.ModelError, match="not a NumPyro `MCMCKernel`"):
        loss_of(objective, gaussian, jnp.arange(3.0), params={"precision": 1.0})


def test_a_langevin_kernel_needs_a_step_size():
    objective = ebm.ContrastiveDivergence(ebm.MALA)
    with pytest.raises(ebm.ModelError, match="MALA: without warm-up.*pass a `step_size`"):
        loss_of(objective, gaussian, jnp.arange(3.0), params={"precision": 1.0})


def test_a_langevin_kernel_does_not_move_discrete_visibles():
    objective = ebm.ContrastiveDivergence(partial(ebm.MALA, step_size=0.1))
    with pytest.raises(ebm.ModelError, match=r"moves continuous sites, and \['v'\] are discrete"):
        loss_of(objective, ising, jnp.asarray(BITS), params=arrays(ISING))


def test_persistent_chains_have_no_covariates():
    objective = ebm.ContrastiveDivergence(ebm.BlockGibbs, persistent=True)
    svi = ebm.EnergySVI(regression, None, optax.adam(0.1), objective)
    with pytest.raises(ebm.ModelError, match="differs from row to row.*`persistent=False`"):
        svi.run(KEY, 1, jnp.arange(3.0), jnp.ones(3), progress_bar=False)


def test_without_data_there_is_nothing_to_learn():
    with pytest.raises(ebm.ModelError, match="ContrastiveDivergence: .*no observed site"):
        loss_of(ebm.ContrastiveDivergence(ebm.BlockGibbs), rbm)


# Learning


@pytest.mark.slow
@pytest.mark.parametrize("persistent", [False, True])
def test_a_grbm_is_learned_nearly_as_well_as_by_maximum_likelihood(persistent):
    """In nats a row on fresh draws, with the truth as the measure."""
    rng = np.random.default_rng(0)
    truth = {**oracles.GRBM, "scale": np.array([0.7, 0.8])}
    train, test = (oracles.grbm_draws(truth, num, rng) for num in (4_000, 20_000))

    def fit(objective):
        optim = optax.adam(optax.exponential_decay(0.02, 500, 0.5))
        svi = ebm.EnergySVI(oracles.grbm, None, optim, objective)
        init = {"W": 0.1 * jax.random.normal(jax.random.key(3), (2, 3))}
        data = jnp.asarray(train, jnp.float32)
        options = {"batch_size": 400, "init_params": init, "progress_bar": False}
        return svi.run(jax.random.key(1), 2_500, data, **options).params

    def log_likelihood(params):
        return float(np.mean(grbm_log_likelihood(params, jnp.asarray(test))))

    best = log_likelihood(fit(ebm.MaximumLikelihood(num_nodes=48)))
    reached = log_likelihood(fit(ebm.ContrastiveDivergence(ebm.BlockGibbs, persistent=persistent)))
    print(f"truth {log_likelihood(truth):.4f}, ML {best:.4f}, CD {reached:.4f}")
    assert best > log_likelihood(arrays(truth)) - 0.01
    assert reached > best - 0.02


def test_numpyros_kernels_are_refused_under_a_plate_that_subsamples_itself():
    """They would sample the density to the power of the plate's scale."""

    def model(data):
        precision = numpyro.param("precision", 1.0)
        with numpyro.plate("data", 12, subsample_size=3) as rows:
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data[rows])
            ebm.energy("E", 0.5 * precision * v**2)

    objective = ebm.ContrastiveDivergence(partial(numpyro.infer.HMC, step_size=0.1))
    with pytest.raises(ebm.ModelError, match="'data' subsamples itself, and HMC.*batch_size"):
        objective.loss(jax.random.key(0), {"precision": 1.0}, model, None, jnp.arange(12.0))
