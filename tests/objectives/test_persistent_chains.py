# SPDX-License-Identifier: Apache-2.0
"""Persistent chains: where they arrive, their history and diagnostics."""

from functools import partial
from types import SimpleNamespace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import oracles
import pytest
from divergence_cases import (
    KEY,
    RBM,
    Draw,
    Stay,
    arrays,
    draw_grbm,
    grbm_log_states,
    rbm,
    rbm_plated,
)
from jax import lax
from oracles import assert_unbiased, binary_states, jit

import numpyro_ebm as ebm
from numpyro_ebm.objectives.chain_history import RECORDS, SPACING, History
from numpyro_ebm.objectives.persistent_chains import Chains


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
    rings, v = chains.history.rings, jnp.asarray(chains.position["v"])[:256]
    assert int(chains.num_rounds) == 100 and rings["visible"].shape == (RECORDS, 256, 2)
    latest = 100 // SPACING - 1
    np.testing.assert_array_equal(rings["visible"][latest], v)
    energy = -jax.vmap(lambda v: oracles.grbm_log_density(oracles.GRBM, v))(v)
    np.testing.assert_allclose(rings["energy"][latest], energy, rtol=1e-4, atol=1e-4)


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
    """The energies of the modes agree; the visible values do not, of chains in no order."""
    objective = ebm.ContrastiveDivergence(partial(ebm.MALA, step_size=2e-3), 20, persistent=True)
    chains = advanced(objective, two_wells, {"depth": 50.0}, np.tile([-1.0, 1.0], 10), 256)
    r_hat = objective.chain_diagnostics(as_state(chains))
    assert r_hat["visible"][0] > 3 and r_hat["energy"] < 1.3
    with pytest.warns(ebm.ConvergenceWarning, match="1 of 1 visible coordinates"):
        objective.review_state(chains)


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
        chains.history.rings["energy"][20 // SPACING - 1], energy, rtol=1e-4, atol=1e-4
    )
    assert objective.chain_diagnostics(as_state(chains))["energy"] < 1.5


def test_diagnostics_need_chains_and_rounds():
    objective = ebm.ContrastiveDivergence(Stay, persistent=True)
    chains = Chains({"v": jnp.zeros(3)}, jnp.array(15), History.start("light", 3, 1))
    with pytest.raises(ebm.ModelError, match="at least 16 rounds, there were 15"):
        objective.chain_diagnostics(as_state(chains))
    with pytest.raises(ebm.ModelError, match="nothing is remembered.*history=None"):
        objective.chain_diagnostics(as_state(chains._replace(history=None)))
    with pytest.raises(ebm.ModelError, match="holds no persistent chains"):
        objective.chain_diagnostics(as_state(None))


def one_round(objective, system, chains, data, key=KEY):
    """The negative phase of a round: positions of the chains."""
    params = arrays(system.params)
    problem = objective.prepare(KEY, params, system.model, None, (jnp.asarray(data),), {})
    return objective.advance(key, params, problem, chains)[0].noise.position


def test_chains_that_all_restart_are_those_of_contrastive_divergence():
    """Bit for bit: what is left of the old latents is overwritten by a sweep."""
    system = oracles.grbm_system(num_rows=50)
    far = Chains({"v": jnp.full((50, 2), 100.0), "h": jnp.ones((50, 3), int)}, jnp.array(0))
    reset = ebm.ContrastiveDivergence(ebm.BlockGibbs, 2, persistent=True, reset_probability=1.0)
    plain = ebm.ContrastiveDivergence(ebm.BlockGibbs, 2)
    with_reset = jit(lambda far: one_round(reset, system, far, system.data))(far)
    without = jit(lambda: one_round(plain, system, None, system.data))()
    np.testing.assert_array_equal(with_reset["v"], without["v"])
    np.testing.assert_array_equal(with_reset["h"], without["h"])


class Count(Stay):
    """Adds one in every step."""

    def sample(self, state, model_args, model_kwargs):
        return state._replace(z={"v": state.z["v"] + 1.0})


class CountApart(Count):
    leaves_invariant = False  # without a `refresh` that would evaluate it where a step begins


@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_as_many_steps_are_taken_as_are_asked_for(num_steps):
    data = jnp.arange(3.0)
    for kernel, persistent in ((CountApart, False), (Count, True)):
        objective = ebm.ContrastiveDivergence(kernel, num_steps, persistent=persistent)
        problem = objective.prepare(KEY, {"depth": 1.0}, two_wells, None, (data,), {})
        chains = objective.init_state(KEY, {"depth": 1.0}, problem) if persistent else None
        moved = objective.advance(KEY, {"depth": 1.0}, problem, chains)[0].noise.position["v"]
        np.testing.assert_array_equal(moved, data + num_steps)


def test_a_kernel_without_a_test_takes_the_steps_of_a_plain_loop():
    """Its gradient is that of where a step begins, and the energy is computed in the loop alone."""

    def model(data):
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            ebm.energy("E", jnp.sinh(v) * v)

    def noiseless(key, shape=(), *args, **kwargs):
        return jnp.zeros(shape)

    def move(data):
        problem = objective.prepare(KEY, {}, model, None, (data,), {})
        return objective.advance(KEY, {}, problem, None)[0].noise.position["v"]

    data, expected = jnp.array([-2.0, 0.5, 1.0]), jnp.array([-2.0, 0.5, 1.0])
    objective = ebm.ContrastiveDivergence(partial(ebm.ULA, step_size=0.01), 3)
    with mock.patch("blackjax.util.normal", noiseless):
        program = jax.jit(move).lower(data).compile()
    for _ in range(3):
        expected -= 0.01 * (jnp.cosh(expected) * expected + jnp.sinh(expected))
    np.testing.assert_allclose(program(data), expected, rtol=1e-5)


def test_chains_start_at_the_data_and_at_latents_of_the_guide():
    """Unconstrained: the latents are positive."""

    def model(data):
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            h = numpyro.sample("h", ebm.Lebesgue(support=dist.constraints.positive))
            ebm.energy("E", 0.5 * (v - h) ** 2 + h**4)

    def guide(data):
        with numpyro.plate("data", len(data)):
            numpyro.sample("h", dist.LogNormal(2.0 + ebm.visible("v", data), 1e-6))

    data = jnp.arange(3.0)
    objective = ebm.ContrastiveDivergence(Stay, 1, ebm.VaGES())
    problem = objective.prepare(KEY, {}, model, guide, (data,), {})
    start = objective.advance(KEY, {}, problem, None)[0].noise.position
    np.testing.assert_allclose(start["v"], data)
    np.testing.assert_allclose(start["h"], 2.0 + data, rtol=1e-4)


@pytest.mark.parametrize("model", [rbm, rbm_plated])
def test_a_share_of_the_rows_restarts(model):
    """Whole rows, whichever axis they are on."""
    num = 1_000
    data = np.zeros((num, 4), int)
    chains = Chains({"v": jnp.ones((num, 4), int)}, jnp.array(0))
    system = oracles.System(model, None, RBM, data, None, None, None)
    objective = ebm.ContrastiveDivergence(Stay, persistent=True, reset_probability=0.2)
    v = np.asarray(jit(lambda chains: one_round(objective, system, chains, data))(chains)["v"])
    assert np.all(v == v[:, :1])
    assert abs(np.sum(v[:, 0] == 0) - 0.2 * num) < 4.5 * np.sqrt(0.16 * num)


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_a_full_history_is_in_its_order(share):
    """The ring has gone round: three more records than it holds."""
    spacing = round(SPACING / share)
    last = (RECORDS + 3) * spacing
    history = History.start("light", 2, 1, share)
    assert history is not None

    def record(history, i):
        return history.record(i, lambda: (i * jnp.ones((2, 1)), i * jnp.ones(2))), None

    history, _ = jax.lax.scan(record, history, jnp.arange(1, last + 1))
    expected = spacing * np.arange(4, RECORDS + 4)
    for x in history.remembered(jnp.array(last)).values():
        np.testing.assert_array_equal(x.reshape(RECORDS, -1)[:, 1], expected)


@pytest.mark.parametrize(
    "kind, num_coordinates, chains, name, size",
    [
        ("full", 20, 300, "visible", 20),
        ("light", 20, 256, "projections", 16),
    ],
)
def test_a_history_remembers_what_is_said(kind, num_coordinates, chains, name, size):
    """All coordinates of all chains, or 16 projections of 256, with weights of variance 1/d."""
    history = History.start(kind, 300, num_coordinates)
    rings = {"energy": (RECORDS, chains), name: (RECORDS, chains, size)}
    assert {k: x.shape for k, x in history.rings.items()} == rings
    units = jnp.eye(chains, num_coordinates)  # each chain is one unit away in one direction
    history = history.record(jnp.array(SPACING), lambda: (units, jnp.arange(float(chains))))
    (found,) = history.remembered(jnp.array(SPACING))[name]
    if name == "visible":
        return np.testing.assert_array_equal(found, units)
    weights = found[:num_coordinates] * np.sqrt(num_coordinates)
    assert abs(np.mean(weights**2) - 1) < 4.5 * np.sqrt(2 / weights.size)
    assert np.all(found[num_coordinates:] == 0)
