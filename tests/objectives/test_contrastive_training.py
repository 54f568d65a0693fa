# SPDX-License-Identifier: Apache-2.0
"""Contrastive divergence in training: resumption, other trainers, what it refuses."""

import pickle
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import optax
import oracles
import pytest
from divergence_cases import BITS, ISING, KEY, arrays, ising, rbm, regression
from numpyro.distributions import constraints
from numpyro.infer import SVI
from oracles import jit

import numpyro_ebm as ebm
from numpyro_ebm.objectives.chain_history import RECORDS, SPACING


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


@pytest.mark.slow
def test_chains_are_part_of_the_training_state(persistent_run):
    svi, fit = persistent_run
    chains = fit.state.objective_state
    assert chains.position["v"].shape == (20, 2) and chains.position["h"].shape == (20, 3)
    rings = chains.history.rings
    assert rings["visible"].shape == (RECORDS, 20, 2) and int(chains.num_rounds) == 24
    records = 24 // SPACING
    for ring in rings.values():
        assert np.all(np.std(ring[:records], 1) > 0) and np.all(ring[records:] == 0)
    r_hat = svi.loss.chain_diagnostics(fit.state)
    assert np.isfinite(r_hat["visible"]).all() and np.isfinite(r_hat["energy"])


@pytest.mark.slow
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


@pytest.mark.slow
def test_evaluate_looks_at_the_next_round_and_changes_nothing(persistent_run, stable_update):
    svi, fit = persistent_run
    before = jax.tree.map(jnp.copy, fit.state)
    loss = jit(svi.evaluate)(fit.state, ROWS[:20])
    assert_same(before, fit.state)
    new_state, next_loss = stable_update(fit.state, ROWS[:20])
    np.testing.assert_allclose(loss, next_loss, rtol=1e-5)
    old, new = fit.state.objective_state, new_state.objective_state
    assert int(new.num_rounds) == int(old.num_rounds) + 1
    assert not np.array_equal(new.position["v"], old.position["v"])


@pytest.fixture(scope="module")
def stable_update(persistent_run):
    return jit(persistent_run[0].stable_update)


def test_stable_update_keeps_the_chains_too(persistent_run, stable_update):
    _, fit = persistent_run
    # A batch from another world: the chains stay as well as the parameters.
    kept, loss = stable_update(fit.state, jnp.full((20, 2), jnp.inf))
    assert np.isnan(loss)
    assert_same(kept, fit.state._replace(step=fit.state.step + 1))


def test_init_and_update_without_run():
    svi = persistent_svi()
    state = svi.init(KEY, ROWS)
    assert state.objective_state.position["v"].shape == (60, 2)
    assert int(state.objective_state.num_rounds) == 0


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


@pytest.mark.slow
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


@pytest.mark.parametrize(
    "kernel",
    [ebm.BlockGibbs(ebm.fixed(gaussian, {"precision": 1.0})), "MALA", None],
)
def test_the_kernel_is_a_function_of_a_model(kernel):
    with pytest.raises(ebm.ModelError, match="ContrastiveDivergence: `kernel` must be a function"):
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


def test_chains_of_rows_with_covariates_need_to_know_their_rows():
    objective = ebm.ContrastiveDivergence(ebm.BlockGibbs, persistent=True)
    svi = ebm.EnergySVI(regression, None, optax.adam(0.1), objective)
    with pytest.raises(ebm.ModelError, match="differs from row to row.*`EnergySVI.run`"):
        svi.init(KEY, jnp.arange(3.0), jnp.ones(3))


def test_without_data_there_is_nothing_to_learn():
    with pytest.raises(ebm.ModelError, match="ContrastiveDivergence: .*no observed site"):
        loss_of(ebm.ContrastiveDivergence(ebm.BlockGibbs), rbm)
