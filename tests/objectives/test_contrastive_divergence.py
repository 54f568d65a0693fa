# SPDX-License-Identifier: Apache-2.0
"""Contrastive divergence: its gradient is the likelihood's where the chains are, and no further."""

import itertools
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import oracles
import pytest
from divergence_cases import (
    BITS,
    ISING,
    KEY,
    RBM,
    Draw,
    Stay,
    arrays,
    draw_grbm,
    grbm_log_states,
    ising,
    ising_log_density,
    rbm,
    rbm_plated,
    regression,
)
from jax.nn import softplus
from jax.scipy.special import logsumexp
from oracles import assert_unbiased, binary_states, draws, flat

import numpyro_ebm as ebm
from numpyro_ebm.models import grbm_log_likelihood


def draw_gaussian(rng_key, p, num_rows):
    covariance = jnp.linalg.inv(0.5 * (p["precision"] + p["precision"].T))
    return {"v": jax.random.multivariate_normal(rng_key, p["mean"], covariance, (num_rows,))}


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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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
