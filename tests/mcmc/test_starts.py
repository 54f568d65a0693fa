# SPDX-License-Identifier: Apache-2.0
"""Every row comes to move, wherever it starts: draws with defaults have the right moments."""

import importlib.util
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from kernel_cases import init, run, slow

import numpyro_ebm as ebm

PATH = Path(__file__).parents[2] / "benchmarks" / "supports.py"
spec = importlib.util.spec_from_file_location("supports", PATH)
supports = importlib.util.module_from_spec(spec)
spec.loader.exec_module(supports)


def assert_right(name, kernel, num_rows, **options):
    support = supports.SUPPORTS[name]
    found, error, said = supports.measure(support, supports.KERNELS[kernel], num_rows, **options)
    assert abs(found - support.expected) < 4 * error or said, (found, support.expected, error)


@pytest.mark.parametrize("name", ["real", slow("ordered_vector"), slow("positive_ordered_vector")])
def test_many_rows_with_defaults(name):
    assert_right(name, "MALA", 200)


@pytest.mark.slow
@pytest.mark.parametrize("num_rows", supports.ROWS)
@pytest.mark.parametrize("kernel", supports.KERNELS)
@pytest.mark.parametrize("name", supports.SUPPORTS)
def test_every_support_and_kernel_with_defaults(name, kernel, num_rows):
    assert_right(name, kernel, num_rows)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::numpyro_ebm.ConvergenceWarning")
@pytest.mark.parametrize("setting", supports.STARVED)
def test_runs_of_wrong_steps_or_short_warmups_are_right_or_warn(setting):
    support, (kernel, options) = supports.SUPPORTS["positive"], supports.STARVED[setting]
    found, error, said = supports.measure(support, kernel, 50, 7, **options)
    assert abs(found - support.expected) < 4 * error or said


def scales(num_rows=30):
    """Rows with precisions from 1e-2 to 1e6."""
    precision = jnp.geomspace(1e-2, 1e6, num_rows)
    with numpyro.plate("data", num_rows):
        v = numpyro.sample("v", ebm.Lebesgue((2,)))
        ebm.energy("E", 0.5 * precision * jnp.sum(v**2, -1))


@pytest.mark.parametrize("kernel", [ebm.MALA, slow(ebm.MCLMC)])
def test_rows_of_different_scales(kernel):
    _, draws = run(kernel(ebm.fixed(scales, {})), 2_000, 1_000)
    whitened = draws["v"][0] ** 2 * np.geomspace(1e-2, 1e6, 30)[:, None]
    by_row = whitened.mean((0, 2))
    error = by_row.std() / 30**0.5
    assert abs(by_row.mean() - 1) < 4 * error and error < 0.1


def ball(num_rows=100, radius=1.7):
    with numpyro.plate("data", num_rows):
        v = numpyro.sample("v", ebm.Lebesgue((2,)))
        square = jnp.sum(v**2, -1)
        ebm.energy("E", jnp.where(square > radius**2, jnp.inf, 0.5 * square))


def half_line(num_rows=100):
    with numpyro.plate("data", num_rows):
        v = numpyro.sample("v", ebm.Lebesgue())
        ebm.energy("E", v - 2 * jnp.log(v))  # NaN below 0


def forbidden(num_rows=100):
    with numpyro.plate("data", num_rows):
        s = numpyro.sample("s", ebm.Counting(2, (4,)))
        ebm.energy("E", jnp.where(jnp.sum(s, -1) == 1, 0.0, jnp.inf))


@pytest.mark.parametrize(
    "kernel, model",
    [
        (ebm.MALA, ball),
        (ebm.ReplicaExchange, ball),
        (ebm.UnderdampedLangevin, half_line),
        (lambda m: ebm.BlockGibbs(m), forbidden),
    ],
)
def test_bad_initial_rows_are_drawn_anew(kernel, model):
    state = init(kernel(ebm.fixed(model, {})))
    assert np.all(np.isfinite(state.potential_energy))
    if kernel is ebm.MALA:
        assert state.adapt_state.step_size.shape == (100,)
    assert len(np.unique(jax.tree.leaves(state.z)[0], axis=0)) > 3  # each for itself


def test_a_wall_that_no_start_passes_is_an_error_with_its_rows():
    with pytest.raises(ebm.ModelError, match=r"initial values of 100 of 100 rows.*drawn 100 times"):
        init(ebm.MALA(ebm.fixed(ball, {})), radius=1e-6)


@pytest.mark.slow
def test_draws_behind_a_hard_wall():
    """N(0, I) in a disc: the squared radius is exponential, cut off at 1.7²."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draws = ebm.sample(jax.random.key(0), ebm.fixed(ball, {}), 1_000, kernel=ebm.MALA)["v"]
    square = np.sum(np.asarray(draws) ** 2, -1)
    assert square.max() <= 1.7**2
    cut = 1.7**2 / 2
    expected = 2 * (1 - cut / np.expm1(cut))
    units = square.reshape(100, 10, 100).mean(1)
    assert abs(units.mean() - expected) < 4 * units.std() / units.size**0.5


def test_given_values_are_not_drawn_anew():
    start = {"v": jnp.full((100, 2), 5.0)}
    with pytest.raises(ebm.ModelError, match="initial values of 100 of 100"):
        init(ebm.MALA(ebm.fixed(ball, {})), params=start)


def test_steps_of_discrete_rows_are_their_own():
    """Couplings from none to strong: each row finds the step that it accepts."""

    def magnets(num_rows=20):
        strength = jnp.linspace(0.0, 3.0, num_rows)
        with numpyro.plate("data", num_rows):
            s = numpyro.sample("s", ebm.Counting(2, (8,)))
            ebm.energy("E", strength * (jnp.sum(s, -1) - 4.0) ** 2)

    mcmc, _ = run(ebm.DiscreteLangevin(ebm.fixed(magnets, {})), 500, 500)
    steps = np.asarray(mcmc.last_state.adapt_state.step_size)
    assert steps.shape == (20,) and steps[:2].min() > 2 * steps[10:].max()
