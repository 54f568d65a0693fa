# SPDX-License-Identifier: Apache-2.0
"""Simulation-based calibration: right routes pass it, wrong ones do not."""

from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import NUTS
from numpyro.infer.mcmc import MCMCKernel
from scipy import stats

import numpyro_ebm as ebm
from numpyro_ebm.model.arguments import Arguments
from numpyro_ebm.posteriors import routes
from numpyro_ebm.posteriors.routes import _warn_of_correlation
from numpyro_ebm.posteriors.uniform_ranks import rank_bands

KEY = jax.random.key(0)
X = np.linspace(0.5, 2.0, 10)


def gaussian(data):
    mean = numpyro.sample("mean", dist.Normal(0.0, 1.0))
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", 0.5 * X * (v - mean) ** 2)


def exact_rows(rng_key, params):
    return {"v": params["mean"] + jax.random.normal(rng_key, (10,)) / jnp.sqrt(X)}


@partial(jax.jit, static_argnames="num")
def conjugate(rng_key, data, *, power=1.0, shift=0.0, num=49):
    precision = 1.0 + power * jnp.sum(X)
    centre = power * jnp.sum(X * data) / precision
    noise = jax.random.normal(rng_key, (num,))
    return {"mean": centre + (shift + noise) / jnp.sqrt(precision)}


def p_value(route, num=300, **options):
    found = ebm.simulation_based_calibration(
        KEY, gaussian, route, num, np.zeros(10), simulate=exact_rows, **options
    )
    return found.p_value


def slow(*values, **options):
    return pytest.param(*values, marks=pytest.mark.slow, **options)


@pytest.mark.parametrize(
    "options, is_right",
    [
        pytest.param({}, True, id="right"),
        slow({"num": 500}, True, id="thinned"),
        pytest.param({"power": 4.0}, False, id="half as wide"),
        slow({"power": 0.25}, False, id="twice as wide"),
        slow({"shift": 1.0}, False, id="a standard deviation off"),
    ],
)
def test_right_routes_have_uniform_ranks_and_wrong_ones_do_not(options, is_right):
    found = p_value(partial(conjugate, **options))
    assert found > 0.01 if is_right else found < 1e-3


def test_p_values_of_uniform_ranks_are_uniform():
    rng = np.random.default_rng(3)
    bands = rank_bands(100, 19)
    found = bands.p_values(rng.integers(0, 20, (100, 2_000)))
    for level in (0.01, 0.1, 0.5):
        share = np.mean(found <= level)
        assert share < level + 4 * np.sqrt(level * (1 - level) / 2_000)
        assert share > 0.6 * level  # counts are whole numbers
    np.testing.assert_allclose(bands.tails, bands.tails[::-1, ::-1])  # either end is as the other
    inside = [low_high for low_high in zip(*bands.band(0.95), strict=True)]
    functions = bands.distribution(rng.integers(0, 20, (100, 2_000)))
    low, high = np.array(inside).T
    within = np.mean(np.all((functions >= low - 1e-9) & (functions <= high + 1e-9), 1))
    assert abs(within - 0.95) < 0.03


def two_parameters(data, *, num_bits=2):
    with numpyro.plate("pair", 2):
        logit = numpyro.sample("logit", dist.Normal(0.0, 1.0))
    numpyro.sample("coin", dist.Bernoulli(0.5))
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Counting(event_shape=(num_bits,)), obs=data)
        ebm.energy("E", -v @ logit)


def test_parameters_are_judged_together_and_ties_are_broken():
    def prior_only(rng_key, data, *, num_bits):
        key_logit, key_coin = jax.random.split(rng_key)
        return {
            "logit": jax.random.normal(key_logit, (19, 2)),
            "coin": jax.random.bernoulli(key_coin, 0.5, (19,)).astype(int),
        }

    found = ebm.simulation_based_calibration(
        KEY,
        two_parameters,
        prior_only,
        400,
        np.zeros((1, 2), int),
        num_draws=19,
        num_bits=2,
        simulate=lambda key, params: {"v": jnp.zeros((1, 2), int)},
    )
    # Ranks of the prior among its own draws are uniform, of a discrete parameter too.
    assert found.ranks["logit"].shape == (400, 2) and found.p_values["coin"].shape == ()
    assert found.p_value > 0.01
    each = np.append(found.p_values["logit"], found.p_values["coin"])
    assert found.p_value == min(1.0, 3 * each.min())
    pytest.importorskip("matplotlib").use("agg")
    assert len(found.plot().lines) == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["exchange", "normalized", "a loss at a high rate"])
def test_kernels_on_all_data_sets_are_one_program(name):
    kernel = {
        "exchange": lambda: ebm.Exchange(gaussian, exact_rows),
        "normalized": lambda: NUTS(ebm.normalized(gaussian)),
        "a loss at a high rate": lambda: NUTS(ebm.generalized(gaussian, ebm.ScoreMatching(), 4.0)),
    }[name]()
    found = p_value(kernel, 200, num_draws=19, num_warmup=300)
    assert found < 1e-3 if "loss" in name else found > 0.01


def test_correlated_draws_are_told():
    def slow(rng_key, data):
        draws = jnp.repeat(conjugate(rng_key, data, num=10)["mean"], 5)
        return {"mean": draws}

    with pytest.warns(ebm.ConvergenceWarning, match="'mean' have a correlation of 0"):
        p_value(slow, num=20)


def transformed(data):
    mean = numpyro.sample("mean", dist.Normal(0.0, 1.0))
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=jnp.log(data))
        ebm.energy("E", 0.5 * (v - mean) ** 2)


def unset(data):
    scale = numpyro.param("scale", 1.0)
    mean = numpyro.sample("mean", dist.Normal(0.0, 1.0))
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", 0.5 * ((v - mean) / scale) ** 2)


@pytest.mark.parametrize(
    "model, route, options, words",
    [
        (gaussian, lambda key, data: conjugate(key, data, num=5), {}, "returned .5. draws"),
        (gaussian, lambda key, data: jnp.zeros(49), {}, "must return draws"),
        (gaussian, lambda key, data: {"tau": jnp.zeros(49)}, {}, "returned draws of .'tau'."),
        (gaussian, lambda key, data: {"mean": jnp.zeros((49, 2))}, {}, r"shape \(49, 2\)"),
        (gaussian, lambda key, data: {"mean": jnp.full(49, jnp.nan)}, {}, "not finite in 3"),
        (gaussian, conjugate, {"simulate": lambda key, params: {"x": 1.0}}, "must return 'v'"),
        (gaussian, conjugate, {"num_draws": 0}, "`num_draws`"),
        (transformed, conjugate, {}, "'v' are no argument"),
        (unset, conjugate, {}, "'scale'. have no prior"),
    ],
)
def test_bad_routes_are_refused(model, route, options, words):
    options = {"simulate": exact_rows, **options}
    with pytest.raises(ebm.ModelError, match=words):
        ebm.simulation_based_calibration(KEY, model, route, 3, np.ones(10), **options)


def test_the_conjugate_posterior_is_that_of_a_grid():
    """The oracle of the tests above."""
    data = np.asarray(exact_rows(KEY, {"mean": 1.5})["v"])
    grid = np.linspace(-5.0, 5.0, 20_001)
    log_p = stats.norm.logpdf(grid) - 0.5 * np.sum(X * (data - grid[:, None]) ** 2, 1)
    p = np.exp(log_p - log_p.max()) / np.exp(log_p - log_p.max()).sum()
    draws = np.asarray(conjugate(KEY, data, num=100_000)["mean"])
    np.testing.assert_allclose(draws.mean(), p @ grid, atol=0.005)
    np.testing.assert_allclose(draws.std(), np.sqrt(p @ (grid - p @ grid) ** 2), rtol=0.01)


def test_draws_of_a_route_are_thinned_over_all_of_them():
    """A route with draws that are known: the rank of a truth is its place among each hundredth."""
    grid = np.linspace(-3.0, 3.0, 601) * (-1) ** (np.arange(601) // 100)
    found = ebm.simulation_based_calibration(
        *(jax.random.key(5), gaussian, lambda key, data: {"mean": grid}, 40, np.zeros(10)),
        **{"simulate": exact_rows, "num_draws": 7, "progress_bar": False},
    )
    expected = np.sum(grid[::100, None] < found.params["mean"], 0)
    np.testing.assert_array_equal(found.ranks["mean"], expected)


def test_the_correlation_of_few_draws_is_not_taken_for_less():
    """Five independent draws, each of them twice, are correlated by one half."""
    draws = np.random.default_rng(5).normal(size=(4_000, 5))
    with pytest.warns(ebm.ConvergenceWarning, match=r"'mean' have a correlation of 0\.(49|50|51)"):
        _warn_of_correlation({"mean": np.repeat(draws, 2, 1)}, 10)
    _warn_of_correlation({"mean": draws}, 5)


class Count(NamedTuple):
    z: Any


class Counter(MCMCKernel):
    """Adds one in every step to what it starts at, the first number of its data."""

    sample_field = "z"
    model = None

    def init(self, rng_key, num_warmup, init_params, model_args, model_kwargs):
        return Count(model_args[0][0])

    def sample(self, state, model_args, model_kwargs):
        return state._replace(z=state.z + 1)

    def postprocess_fn(self, model_args, model_kwargs):
        return lambda z: {"theta": 10.0 * z}


def test_draws_of_a_kernel_follow_its_warm_up_and_are_thinned(monkeypatch):
    """On every data set, those of a group that is not full among them."""
    monkeypatch.setattr(routes, "AT_ONCE", 2)
    arguments = Arguments((jnp.zeros(2),), {})
    (label,) = arguments.arrays
    data, steps = jnp.array([[0.0, 9.0], [100.0, 9.0], [200.0, 9.0]]), []
    found = routes._by_kernel(
        *(Counter(), jax.random.split(jax.random.key(0), 3), {label: data}, arguments),
        *(4, 7, 3, SimpleNamespace(step=steps.append)),
    )
    expected = np.array([[0.0], [100.0], [200.0]]) + 7 + 3 * np.arange(1, 5)
    np.testing.assert_allclose(found["theta"], 10.0 * expected)
    assert steps == [2, 1]
