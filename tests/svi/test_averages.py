# SPDX-License-Identifier: Apache-2.0
"""Moving averages of the parameters beside a run."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from oracles import jit

import numpyro_ebm as ebm

DATA = np.random.default_rng(4).normal(1.0, 2.0, 60)


def model(data):
    mean = numpyro.param("mean", 0.0)
    precision = numpyro.param("precision", 1.0, constraint=dist.constraints.positive)
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        h = numpyro.sample("h", ebm.Lebesgue())
        ebm.energy("E", 0.5 * precision * (v - mean) ** 2 + 0.5 * (h - v) ** 2)


def guide(data):
    slope = numpyro.param("slope", 0.2)
    with numpyro.plate("data", len(data)):
        v = ebm.visible("v", data)
        numpyro.sample("h", dist.Normal(slope * v, 1.0))


def svi():
    objective = ebm.DenoisingScoreMatching(0.3, ebm.VaGES(4))
    return ebm.EnergySVI(model, guide, optax.adam(0.1), objective)


def run(one, num_steps, **options):
    return one.run(jax.random.key(1), num_steps, DATA, progress_bar=False, **options)


def test_an_average_is_mostly_the_old_one():
    """In log(precision), from where the parameters start, round after round."""

    def gaussian(data):
        mean = numpyro.param("mean", 0.5)
        precision = numpyro.param("precision", 1.0, constraint=dist.constraints.positive)
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            ebm.energy("E", 0.5 * precision * (v - mean) ** 2)

    one = ebm.EnergySVI(gaussian, None, optax.adam(0.1), ebm.DenoisingScoreMatching(0.3))
    state, mean, log_precision = None, 0.5, 0.0
    for _ in range(2):
        fit = run(one, 1, ema=0.8, init_state=state)
        state = fit.state
        mean = 0.8 * mean + 0.2 * fit.params["mean"]
        log_precision = 0.8 * log_precision + 0.2 * np.log(fit.params["precision"])
        np.testing.assert_allclose(fit.ema_params["mean"], mean, rtol=1e-5)
        np.testing.assert_allclose(fit.ema_params["precision"], np.exp(log_precision), rtol=1e-5)


@pytest.mark.slow
def test_averages_are_those_of_a_loop():
    """In log(precision), of the guide's parameters too, and nothing else changes."""
    one = svi()
    fit, plain = run(one, 12, ema=0.8), run(svi(), 12)
    np.testing.assert_array_equal(fit.losses, plain.losses)
    state = one.init(jax.random.key(1), DATA)
    expected = {"mean": 0.0, "precision": 0.0, "slope": 0.2}
    update = jit(one.update)
    for _ in range(12):
        state, _ = update(state, DATA)
        params = one.get_params(state)
        now = {**params, "precision": np.log(params["precision"])}
        expected = {name: 0.8 * expected[name] + 0.2 * now[name] for name in expected}
    expected["precision"] = np.exp(expected["precision"])
    assert fit.ema_params.keys() == expected.keys()
    for name, x in expected.items():
        np.testing.assert_allclose(fit.ema_params[name], x, rtol=1e-5)
    assert plain.ema_params is None and abs(fit.ema_params["mean"] - fit.params["mean"]) > 1e-3


@pytest.mark.slow
def test_averages_go_on_where_a_run_does():
    one = svi()
    whole = run(one, 20, ema=0.9)
    first = run(one, 8, ema=0.9)
    second = run(one, 12, ema=0.9, init_state=first.state)
    for name, x in whole.ema_params.items():
        np.testing.assert_array_equal(second.ema_params[name], x)
    later = run(one, 1, ema=0.5, init_state=run(one, 8).state)  # from the parameters there
    np.testing.assert_allclose(
        later.ema_params["mean"], 0.5 * (first.params["mean"] + later.params["mean"]), rtol=1e-5
    )
    assert run(one, 1, init_state=first.state).ema_params is None
    params, state, losses = second
    assert len(losses) == 12 and jax.tree.structure(state) == jax.tree.structure(first.state)
    kept = pickle.loads(pickle.dumps(second._replace(state=None, losses=None)))
    assert kept.params.keys() == params.keys()


@pytest.mark.parametrize("ema", [0.0, 1.0, 1.5, -0.1, jnp.nan])
def test_a_decay_out_of_its_range_is_refused(ema):
    with pytest.raises(ebm.ModelError, match="ema"):
        run(svi(), 2, ema=ema)
