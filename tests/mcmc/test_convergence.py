# SPDX-License-Identifier: Apache-2.0
"""Runs that went wrong say so, with numbers, and right ones say nothing."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import optax
import pytest
import scipy.special
import scipy.stats
from kernel_cases import run, slow
from numpyro.diagnostics import split_gelman_rubin
from numpyro.distributions import constraints
from numpyro.infer import Gibbs

import numpyro_ebm as ebm
from numpyro_ebm.mcmc.convergence import _split_r_hat, assess_draws
from numpyro_ebm.mcmc.watch import Watch
from numpyro_ebm.model.reading import read_fixed_model


def plated(energy, num_rows=30, size=2):
    def model():
        with numpyro.plate("data", num_rows):
            v = numpyro.sample("v", ebm.Lebesgue((size,)))
            ebm.energy("E", energy(v))

    return ebm.fixed(model, {})


def improper(v):
    return -0.5 * jnp.sum(v**2, -1)


def flat(v):
    return 0.0 * jnp.sum(v, -1)


def apart(v):
    return -jnp.logaddexp(*(-20 * jnp.sum((v - m) ** 2, -1) for m in (-1.5, 1.5)))


def quartic(v):
    return jnp.sum(v**4, -1)


GRBM = {"W": jnp.ones((2, 4)), "b": jnp.zeros(2), "c": -jnp.ones(4), "scale": jnp.ones(2)}


def waits(kernel, *args, **options):
    """A run whose looks at the chains have all come to the host."""
    done = run(kernel, *args, **options)
    jax.effects_barrier()
    return done


@pytest.mark.parametrize(
    "energy, message",
    [
        (improper, r"sample \(MALA\).*(R-hat.*largest value|not finite)"),
        slow(flat, r"R-hat is above 2 in 30 of 30 rows \(largest \d"),
        slow(apart, r"R-hat is above 2 in 30 of 30 rows"),
    ],
)
def test_sample_says_that_chains_run_away_or_stay_apart(energy, message):
    with pytest.warns(ebm.ConvergenceWarning, match=message):
        ebm.sample(jax.random.key(0), plated(energy), 500, kernel=ebm.MALA)


@pytest.mark.parametrize(
    "kernel",
    [
        ebm.MALA,
        slow(ebm.MCLMC),
        slow(ebm.ReplicaExchange),
        slow(ebm.UnderdampedLangevin),
    ],
)
def test_kernels_say_that_energies_fall_without_end(kernel):
    """Until steps are too small for a float: then rows do not move."""
    with pytest.warns(ebm.ConvergenceWarning, match="energies still fall|did not move|so large"):
        waits(kernel(plated(improper)), 150, 100)


def test_steps_without_a_test_that_leave_the_support_are_told():
    with pytest.warns(ebm.ConvergenceWarning, match=r"ULA: the energy is not finite in 30 of 30"):
        waits(ebm.ULA(plated(quartic), step_size=1.0), 30, 0)
    wall = plated(lambda v: jnp.where(v[:, 0] > 2, jnp.inf, 0.5 * jnp.sum(v**2, -1)))
    with pytest.warns(ebm.ConvergenceWarning, match=r"\d+ of 30 rows, are not finite.*smaller"):
        ebm.sample(jax.random.key(0), wall, 500, kernel=lambda m: ebm.ULA(m, 0.3))


def coupled(num_rows=30):
    """Both conditionals are N(1.2 times the other, 1), and no joint law has them."""

    def model():
        with numpyro.plate("data", num_rows):
            x = numpyro.sample("x", ebm.Lebesgue())
            y = numpyro.sample("y", ebm.Lebesgue())
            ebm.energy("E", 0.5 * x**2 + 0.5 * y**2 - 1.2 * x * y)

    return ebm.fixed(model, {})


def mixed(num_rows=30):
    """A quartic and a spin, for a block each."""

    def model():
        with numpyro.plate("data", num_rows):
            x = numpyro.sample("x", ebm.Lebesgue())
            s = numpyro.sample("s", ebm.Counting(2))
            ebm.energy("E", x**4 - 0.1 * s * x)

    return ebm.fixed(model, {})


@pytest.mark.parametrize("options", [{}, {"num_chains": 4, "chain_method": "vectorized"}])
def test_conditionals_without_a_joint_law_are_told(options):
    with pytest.warns(ebm.ConvergenceWarning, match="BlockGibbs: the energies (still|of)"):
        waits(ebm.BlockGibbs(coupled()), 30, 10, **options)


@pytest.mark.parametrize("first", [0, slow(1)])
def test_blocks_of_gibbs_are_watched(first):
    model = mixed()
    kernels = [
        (ebm.MALA(model, step_size=1e4, adapt_step_size=False), ["x"]),
        (ebm.BlockGibbs(model, [["s"]]), ["s"]),
    ]
    with pytest.warns(ebm.ConvergenceWarning, match="MALA: 30 of 30 rows did not move in 75"):
        waits(Gibbs([kernels[first], kernels[1 - first]]), 110, 0)


@pytest.mark.slow
def test_blocks_of_gibbs_that_run_away_are_told():
    model = coupled()
    blocks = [(ebm.MALA(model), ["x"]), (ebm.BlockGibbs(model, [["y"]]), ["y"])]
    with pytest.warns(ebm.ConvergenceWarning, match="(MALA|BlockGibbs): the energ(y|ies) "):
        waits(Gibbs(blocks), 120, 50)
    with pytest.warns(ebm.ConvergenceWarning, match="sample"):
        ebm.sample(jax.random.key(0), model, 300, kernel=Gibbs(blocks))


def test_right_sweeps_say_nothing():
    """Warnings are errors here."""
    waits(ebm.BlockGibbs(ebm.fixed(ebm.models.grbm, GRBM)), 450, 20, num_rows=30)
    model = mixed()
    blocks = [(ebm.MALA(model), ["x"]), (ebm.BlockGibbs(model, [["s"]]), ["s"])]
    waits(Gibbs(blocks), 150, 100)


def test_rows_that_do_not_move_are_counted():
    """Three rows start where no step of the given size is ever accepted."""
    start = {"v": jnp.zeros((30, 2)).at[:3].set(50.0)}
    kernel = ebm.MALA(plated(quartic), step_size=0.1, adapt_step_size=False)
    with pytest.warns(ebm.ConvergenceWarning, match="MALA: 3 of 30 rows did not move in 75 steps"):
        mcmc, draws = waits(kernel, 200, 0, init_params=start)
    row_model = read_fixed_model(kernel.model, (), {})
    fields = mcmc.get_extra_fields(group_by_chain=True)
    found = assess_draws(row_model, draws, fields)
    np.testing.assert_array_equal(found.frozen, [1] * 3 + [0] * 27)
    assert np.all(found.acceptance[:3] < 0.01) and np.all(found.acceptance[3:] > 0.3)
    assert np.all(np.isinf(found.r_hat[:3])) and np.all(found.r_hat[3:] < 1.5)
    with pytest.warns(ebm.ConvergenceWarning, match=r"to_arviz \(MALA\): 3 of 30 rows did not mov"):
        stats = ebm.to_arviz(mcmc)["sample_stats"]
    np.testing.assert_array_equal(stats["row_frozen"].values[0, 0], [1.0] * 3 + [0.0] * 27)
    assert stats["row_r_hat"].shape == (1, 200, 30)


@pytest.mark.slow
def test_right_runs_say_nothing():
    """Warnings are errors here; half of a Cholesky factor is always 0."""

    def factors():
        with numpyro.plate("data", 5):
            v = numpyro.sample("v", ebm.Lebesgue((2, 2), constraints.lower_cholesky))
            ebm.energy("E", 0.5 * jnp.sum(v**2, (-1, -2)))

    ebm.sample(jax.random.key(0), ebm.fixed(factors, {}), 300)
    model = plated(lambda v: 0.5 * jnp.sum(v**2, -1), 5)
    mcmc, draws = waits(ebm.MALA(model), 500, 200)
    ebm.to_arviz(mcmc)
    ebm.sample(jax.random.key(0), model, 300, kernel=ebm.MALA)
    found = assess_draws(
        read_fixed_model(model, (), {}), draws, mcmc.get_extra_fields(group_by_chain=True)
    )
    assert found.r_hat.max() < 1.3 and not found.frozen.any() and found.diverging < 0.01


def persistent_fit(step_size, num_steps):
    def gaussian(data):
        shift = numpyro.param("shift", 0.0)
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            ebm.energy("E", 0.5 * (v - shift) ** 2)

    kernel = partial(ebm.MALA, step_size=step_size)
    objective = ebm.ContrastiveDivergence(kernel, persistent=True)
    svi = ebm.EnergySVI(gaussian, None, optax.sgd(0.01), objective)
    data = jax.random.normal(jax.random.key(0), (20,))
    return svi.run(jax.random.key(1), num_steps, data, progress_bar=False)


@pytest.mark.slow
def test_persistent_chains_that_do_not_move_are_told_at_the_end_of_a_run():
    with pytest.warns(ebm.ConvergenceWarning, match=r"last 256 rounds R-hat.*1 of 1 visible"):
        persistent_fit(1e-5, 300)
    persistent_fit(0.5, 300)
    persistent_fit(1e-5, 100)  # too soon to tell


def test_r_hat_is_the_larger_of_values_and_of_ranks():
    """A chain that runs away in its values alone, and chains that stay apart."""
    away = np.exp(np.arange(200.0) / 5)[None, :, None]
    noise = np.random.default_rng(0).normal(size=(2, 100))
    apart = (np.array([-10.0, 10.0])[:, None] + noise)[..., None]
    assert _split_r_hat(away) > 2 and _split_r_hat(apart) > 2


def test_r_hat_of_many_laws_is_that_of_their_chains():
    """Laws that differ are no chains that stay apart; of one law it is NumPyro's."""
    rng = np.random.default_rng(0)
    laws = 100 * rng.normal(size=(50, 1, 1, 1))
    right = laws + rng.normal(size=(50, 2, 10, 3))
    stuck = right + 20 * rng.integers(0, 2, (50, 2, 1, 1))  # in half of the laws chains part
    right, stuck = (x.reshape(100, 10, 3) for x in (right, stuck))
    assert np.all(_split_r_hat(right) > 2)
    assert np.all(abs(_split_r_hat(right, 50) - 1) < 0.1) and np.all(_split_r_hat(stuck, 50) > 2)
    one = rng.standard_cauchy((4, 100, 2)) + np.arange(4)[:, None, None]
    ranks = scipy.stats.rankdata(one.reshape(400, 2), axis=0).reshape(one.shape)
    normal = scipy.special.ndtri((ranks - 0.375) / 400.25)
    numpyros = np.fmax(split_gelman_rubin(one), split_gelman_rubin(normal))
    np.testing.assert_allclose(_split_r_hat(one), numpyros, rtol=1e-6)


def test_every_look_is_at_what_happened_since_the_one_before():
    """Rows that moved at first and then stay, and a value that grows, and then stays large."""
    watch, energy = Watch("Kernel", 0, True), np.zeros((1, 3))
    for t, sums, largest in ((0, [0, 0, 0], 1.0), (25, [1, 2, 3], 9.0), (100, [4, 5, 6], 900.0)):
        watch._look(t, energy, np.array([sums]), largest)
    with pytest.warns(ebm.ConvergenceWarning, match="1 of 3 rows did not move in 300 steps"):
        watch._look(400, energy, np.array([[7, 5, 9]]), 900.0)
    with pytest.warns(ebm.ConvergenceWarning, match="grew from 900 to 9.1e.03"):
        watch._look(1_600, energy, np.array([[1, 2, 3]]), 9_100.0)
    watch._look(6_400, energy, np.array([[4, 5, 6]]), 9_500.0)
