# SPDX-License-Identifier: Apache-2.0
"""EnergySVI: rounds, minibatches, resumption, loud stops, and agreement with NumPyro's own SVI."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.infer import SVI, Trace_ELBO
from svi_cases import DATA, assert_same, gaussian, vages_dsm

import numpyro_ebm as ebm
from numpyro_ebm.errors import ModelError
from numpyro_ebm.model.reading import read_model
from numpyro_ebm.models import grbm, grbm_guide
from numpyro_ebm.svi.minibatch import Batches, Orders


@pytest.fixture(scope="module")
def long_run():
    svi = vages_dsm()
    return svi, svi.run(jax.random.key(0), 70, DATA, batch_size=300, progress_bar=False)


def test_resuming_equals_one_long_run_bit_for_bit(long_run):
    svi, whole = long_run
    first = svi.run(jax.random.key(0), 31, DATA, batch_size=300, progress_bar=False)
    # A new object and a pickled state, as after a restart.
    state = pickle.loads(pickle.dumps(first.state))
    again = vages_dsm()
    second = again.run(
        jax.random.key(99), 39, DATA, batch_size=300, init_state=state, progress_bar=False
    )
    assert_same(whole.state, second.state)
    np.testing.assert_array_equal(whole.losses, jnp.concatenate([first.losses, second.losses]))


def test_run_equals_a_loop_of_updates(long_run):
    svi, whole = long_run
    state = svi.init(jax.random.key(0), DATA)
    row_model = read_model(grbm, (DATA,), {}, svi.get_params(state))
    rows = Batches(row_model, (DATA,), {}, 300, state.rng_key).indices(0, 70)
    update = jax.jit(svi.update)
    losses = []
    for i in range(20):
        state, loss = update(state, DATA[rows[i]])
        losses.append(float(loss))
    np.testing.assert_allclose(losses, whole.losses[:20], rtol=2e-4)


def test_a_run_is_a_function_of_its_key(long_run):
    svi, whole = long_run
    other = svi.run(jax.random.key(1), 70, DATA, batch_size=300, progress_bar=False)
    assert not np.allclose(other.losses, whole.losses)


def test_a_run_inside_of_jit_says_what_to_do_instead():
    svi, data = ebm.EnergySVI(gaussian, None, optax.adam(0.1), ebm.ScoreMatching()), jnp.ones(8)
    for wrap in (jax.jit, jax.vmap):
        with pytest.raises(ModelError, match="update` into `jax.lax.scan`"):
            wrap(lambda key: svi.run(key, 3, data).params)(jax.random.split(jax.random.key(0), 2))

    @jax.jit
    def updates(key):
        state = svi.init(key, data)
        return jax.lax.scan(lambda state, _: svi.update(state, data), state, length=3)[1]

    expected = svi.run(jax.random.key(1), 3, data, progress_bar=False).losses
    np.testing.assert_allclose(updates(jax.random.key(1)), expected, rtol=1e-6)


def test_result_is_numpyros():
    svi = ebm.EnergySVI(gaussian, None, numpyro.optim.Adam(0.05), ebm.ScoreMatching())
    data = 2.0 * jax.random.normal(jax.random.key(0), (500,))
    params, state, losses = svi.run(jax.random.key(1), 300, data, progress_bar=False)
    assert losses.shape == (300,)
    np.testing.assert_allclose(params["precision"], 1 / jnp.mean(data**2), rtol=2e-2)
    expected = 0.5 * params["precision"] ** 2 * jnp.mean(data**2) - params["precision"]
    np.testing.assert_allclose(svi.evaluate(state, data), expected, rtol=1e-5)
    np.testing.assert_allclose(svi.get_params(state)["precision"], params["precision"])


@pytest.mark.parametrize("batch_size", [None, 250])
def test_agrees_with_numpyros_svi_on_the_deterministic_objective(batch_size):
    data = jax.random.normal(jax.random.key(0), (250,))
    ours = ebm.EnergySVI(gaussian, None, optax.sgd(0.1), ebm.ScoreMatching())
    theirs = SVI(gaussian, lambda data: None, optax.sgd(0.1), ebm.ScoreMatching())
    fit = ours.run(jax.random.key(0), 50, data, batch_size=batch_size, progress_bar=False)
    reference = theirs.run(jax.random.key(0), 50, data, progress_bar=False)
    np.testing.assert_allclose(fit.losses, reference.losses, rtol=1e-5)
    np.testing.assert_allclose(fit.params["precision"], reference.params["precision"], rtol=1e-5)


@pytest.mark.slow
def test_one_round_agrees_with_numpyros_svi_in_the_mean():
    """One guide step a round from the same state: the same expected step in all parameters."""
    objective = ebm.DenoisingScoreMatching(0.2, marginal=ebm.VaGES(4))
    ours = ebm.EnergySVI(grbm, grbm_guide, optax.sgd(1.0), objective)
    theirs = SVI(grbm, grbm_guide, optax.sgd(1.0), objective)
    init = {
        "W": jnp.full((2, 4), 0.5),
        "b": jnp.zeros(2),
        "c": jnp.zeros(4),
        "scale": jnp.ones(2),
        "A": jnp.full((2, 4), 0.5),
        "d": jnp.zeros(4),
    }
    data = DATA[:200]
    state = ours.init(jax.random.key(0), data, init_params=init)
    reference = theirs.init(jax.random.key(0), data, init_params=init)

    def step(key):
        mine, _ = ours.update(state._replace(rng_key=key), data)
        other, _ = theirs.update(reference._replace(rng_key=key), data)
        return ours.get_params(mine), theirs.get_params(other)

    mine, other = jax.jit(jax.vmap(step))(jax.random.split(jax.random.key(1), 4_000))
    for name in ("A", "d"):  # identical losses of the guide, different random numbers
        difference = mine[name].mean(0) - other[name].mean(0)
        error = jnp.sqrt((mine[name].var(0) + other[name].var(0)) / 4_000)
        assert jnp.all(jnp.abs(difference) < 4.5 * error + 1e-6), name


@pytest.mark.slow
def test_a_guide_step_is_taken_before_the_energy_and_by_its_own_optimiser(long_run):
    svi = vages_dsm(num_guide_steps=3, guide_optim=optax.sgd(0.0))
    state = svi.init(jax.random.key(0), DATA)
    new, _ = jax.jit(svi.update)(state, DATA)
    before, after = svi.get_params(state), svi.get_params(new)
    np.testing.assert_array_equal(before["A"], after["A"])
    assert not np.allclose(before["W"], after["W"])
    assert int(new.guide_optim_state[0]) == 3 and int(new.optim_state[0]) == 1


def test_the_guide_follows_the_posterior():
    """With the energy held still, the default guide loss finds the exact posterior A = W, d = c."""
    init = {
        "W": jnp.array([[1.0, -2.0, 0.5, 1.5], [0.5, 1.0, -1.0, 0.0]]),
        "c": jnp.array([0.5, -0.5, 0.0, 1.0]),
    }
    svi = vages_dsm(guide_optim=optax.adam(optax.exponential_decay(0.05, 500, 0.3)))
    svi.optim = SVI(grbm, grbm_guide, optax.sgd(0.0), Trace_ELBO()).optim
    fit = svi.run(jax.random.key(0), 1_500, DATA, init_params=init, progress_bar=False)
    np.testing.assert_allclose(fit.params["A"], init["W"], atol=0.1)
    np.testing.assert_allclose(fit.params["d"], init["c"], atol=0.1)


@pytest.mark.parametrize("num_rows, batch_size", [(10, 3), (300, 100), (1_000, 64), (1_000, 999)])
def test_minibatches_shuffle_without_replacement(num_rows, batch_size):
    data = jnp.arange(num_rows, dtype=float)
    row_model = read_model(gaussian, (data,), {}, {})
    batches = Batches(row_model, (data,), {}, batch_size, jax.random.key(3))
    per_epoch = num_rows // batch_size
    rows = batches.indices(0, 4 * per_epoch).reshape(4, -1)
    for epoch in rows:
        assert len(set(epoch.tolist())) == per_epoch * batch_size
        assert epoch.min() >= 0 and epoch.max() < num_rows
    assert not np.array_equal(rows[0], rows[1])
    # Any later start sees the same batches, and another key sees others.
    later = Batches(row_model, (data,), {}, batch_size, jax.random.key(3))
    whole = batches.indices(0, per_epoch + 3)
    np.testing.assert_array_equal(later.indices(per_epoch + 1, 2), whole[per_epoch + 1 :])
    other = Batches(row_model, (data,), {}, batch_size, jax.random.key(4))
    assert not np.array_equal(other.indices(0, per_epoch), whole[:per_epoch])


def test_shuffles_are_uniform():
    """Rows at one position, and distances of two positions, over many epochs: chi-square tests."""
    num_rows, epochs = 300, 6_000
    orders = Orders(jax.random.key(0), num_rows)
    order = np.stack([orders(epoch)[[0, 1, 150]] for epoch in range(epochs)])
    for values, cells in (
        (order[:, 0], num_rows),
        (order[:, 2], num_rows),
        ((order[:, 1] - order[:, 0]) % num_rows - 1, num_rows - 1),
        ((order[:, 2] - order[:, 0]) % num_rows - 1, num_rows - 1),
    ):
        expected = epochs / cells
        statistic = np.sum((np.bincount(values, minlength=cells) - expected) ** 2 / expected)
        assert abs(statistic - (cells - 1)) < 4.5 * np.sqrt(2 * (cells - 1))


def test_only_arguments_with_the_rows_are_cut():
    def conditional(data, covariates, weights):
        slope = numpyro.param("slope", jnp.zeros(3))
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            ebm.energy("E", 0.5 * (v - covariates @ (slope * weights)) ** 2)

    x = jax.random.normal(jax.random.key(0), (200, 3))
    truth = jnp.array([1.0, -2.0, 0.5])
    y = x @ truth + 0.01 * jax.random.normal(jax.random.key(1), (200,))
    svi = ebm.EnergySVI(conditional, None, optax.adam(0.05), ebm.ScoreMatching())
    fit = svi.run(
        jax.random.key(2), 600, y, x, weights=jnp.ones(3), batch_size=50, progress_bar=False
    )
    np.testing.assert_allclose(fit.params["slope"], truth, atol=0.05)


def test_rows_of_numpys_and_static_arguments_pass_through():
    def scaled(data, power):
        precision = numpyro.param("precision", 1.0)
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            ebm.energy("E", 0.5 * precision * v**2 if power == "two" else v**4)

    svi = ebm.EnergySVI(scaled, None, optax.adam(0.1), ebm.ScoreMatching())
    data = np.random.default_rng(0).normal(size=100)
    fit = svi.run(jax.random.key(0), 200, data, "two", batch_size=50, progress_bar=False)
    np.testing.assert_allclose(fit.params["precision"], 1 / np.mean(data**2), rtol=0.1)


@pytest.mark.slow
def test_a_subsampling_plate_of_the_model_trains_too():
    def subsampled(data):
        precision = numpyro.param("precision", 1.0, constraint=dist.constraints.positive)
        with numpyro.plate("data", len(data), subsample_size=50):
            batch = numpyro.subsample(data, event_dim=0)
            v = numpyro.sample("v", ebm.Lebesgue(), obs=batch)
            ebm.energy("E", 0.5 * precision * v**2)

    data = jax.random.normal(jax.random.key(0), (500,))
    svi = ebm.EnergySVI(subsampled, None, optax.adam(0.02), ebm.ScoreMatching())
    fit = svi.run(jax.random.key(1), 500, data, progress_bar=False)
    np.testing.assert_allclose(fit.params["precision"], 1 / jnp.mean(data**2), rtol=0.15)
    with pytest.raises(ebm.ModelError, match="subsample_size"):
        svi.run(jax.random.key(1), 5, data, batch_size=10, progress_bar=False)


@pytest.mark.slow
def test_networks_of_equinox_train():
    eqx = pytest.importorskip("equinox")
    from numpyro.contrib.module import eqx_module

    def deep(data):
        net = eqx_module("net", eqx.nn.MLP(2, "scalar", 8, 1, key=jax.random.key(0)))
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(event_shape=(2,)), obs=data)
            ebm.energy("E", jax.vmap(net)(v) + 0.5 * jnp.sum(v**2, -1))

    svi = ebm.EnergySVI(deep, None, optax.adam(1e-2), ebm.DenoisingScoreMatching(0.3))
    fit = svi.run(jax.random.key(0), 300, DATA, batch_size=100, progress_bar=False)
    assert fit.losses[-50:].mean() < fit.losses[:50].mean()
    log_density = ebm.fixed(deep, fit.params)
    trace = numpyro.handlers.trace(log_density).get_trace(DATA[:5])
    assert trace["E"]["fn"].log_prob(trace["E"]["value"]).shape == (5,)
