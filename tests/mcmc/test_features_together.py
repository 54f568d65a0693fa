# SPDX-License-Identifier: Apache-2.0
"""Features that are right one by one, used at once."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from discrete_cases import last

import numpyro_ebm as ebm
from numpyro_ebm.mcmc.adaptation import Adaptation, acceptance_tuner, running_mean
from numpyro_ebm.mcmc.chain_kernel import Chain
from numpyro_ebm.mcmc.convergence import _r_hat, assess_draws
from numpyro_ebm.model.reading import read_fixed_model
from numpyro_ebm.samplers.gibbs_blocks import plan_block

NUM_ROWS = 20_000


def test_one_fixed_energy_does_not_answer_for_another():
    def model():
        with numpyro.plate("data", 4):
            x = numpyro.sample("x", ebm.Lebesgue())
            ebm.fixed(lambda: ebm.energy("held", 0.5 * x**2), {})()
            ebm.energy("free", 0.5 * x**2)

    with pytest.raises(ebm.ModelError):
        ebm.sample(jax.random.key(3), model, 1)


@pytest.mark.parametrize("make", [partial(ebm.MALA, step_size=0.1), ebm.DiscreteLangevin])
def test_one_bad_row_among_good_ones_is_refused(make):
    def model():
        with numpyro.plate("data", 4):
            if make is ebm.DiscreteLangevin:
                x = numpyro.sample("x", ebm.Counting(3, (2,)))
                ebm.energy("E", jnp.where(x[:, 0] > 1, jnp.inf, 0.3 * x[:, 0] * x[:, 1]))
            else:
                x = numpyro.sample("x", ebm.Lebesgue((2,)))
                ebm.energy("E", jnp.where(x[:, 0] > 1, jnp.inf, 0.5 * jnp.sum(x**2, -1)))

    kernel = make(ebm.fixed(model, {}))
    start = jnp.zeros((4, 2), int if make is ebm.DiscreteLangevin else float)
    kernel.init(jax.random.key(3), 5, {"x": start}, (), {})
    bad = start.at[2, 0].set(2)
    with pytest.raises(ebm.ModelError, match=r"rows? 2"):
        kernel.init(jax.random.key(3), 5, {"x": bad}, (), {})
    keys = jax.random.split(jax.random.key(3), 2)
    with pytest.raises(ebm.ModelError, match=r"rows? 2"):  # of the second chain
        kernel.init(keys, 5, {"x": jnp.stack([start, bad])}, (), {})


def two_sites(num_rows=1):
    with numpyro.plate("data", num_rows):
        a = numpyro.sample("a", ebm.Counting(2))
        b = numpyro.sample("b", ebm.Counting(3, (2,)))
        ebm.energy("E", 0.7 * a - 0.9 * a * b[:, 0] + 0.6 * b[:, 0] * b[:, 1] - 0.4 * b[:, 1])


STATES = np.indices((2, 3, 3)).reshape(3, -1).T


def probabilities():
    a, b, c = STATES.T
    weights = np.exp(-0.7 * a + 0.9 * a * b - 0.6 * b * c + 0.4 * c)
    return weights / weights.sum()


def numbers(z):
    """Which of all states."""
    a, b = np.asarray(z["a"]), np.asarray(z["b"])
    return a * 9 + b[:, 0] * 3 + b[:, 1]


@pytest.mark.parametrize(
    "make",
    [
        partial(ebm.DiscreteLangevin, step_size=1.0),
        partial(ebm.DiscreteLangevin, step_size=1.0, differences="exact"),
        ebm.BlockGibbs,
    ],
    ids=["gradient", "exact", "gibbs"],
)
def test_sites_of_two_and_three_values_keep_their_law(make):
    """A table of values is padded to the longest: no unit takes what is there for padding."""
    state = last(make(ebm.fixed(two_sites, {})), NUM_ROWS, 0, 20)
    found = np.bincount(numbers(state.z), minlength=18)
    p = probabilities()
    z = (found - NUM_ROWS * p) / np.sqrt(NUM_ROWS * p * (1 - p))
    assert np.abs(z).max() < 4.5


def test_a_gradient_that_vanishes_at_some_states_is_a_gradient():
    def model():
        with numpyro.plate("data", 4):
            s = numpyro.sample("s", ebm.Counting(2, (2,)))
            ebm.energy("E", -jnp.exp(0.5 * s[:, 0] * s[:, 1]))

    kernel = ebm.DiscreteLangevin(ebm.fixed(model, {}))
    state = kernel.init(jax.random.key(3), 5, None, (), {})
    assert np.all(np.isfinite(state.differences))


def test_a_block_of_two_and_three_values_is_none_of_bits():
    """However little its units interact: a bit is one of two values, and one has three."""
    position = {"a": jnp.zeros((2, 1), int), "b": jnp.zeros((2, 1), int)}
    values = {"a": np.arange(2), "b": np.arange(3)}
    block = plan_block(lambda x: 0.5 * (x["a"] - x["b"])[:, 0], position, "ab", values)
    assert block.degree == 1 and block.kind == "coloured"


def test_a_sweep_there_and_back_over_several_blocks_is_reversible():
    num, rng = 100_000, np.random.default_rng(1)
    x = STATES[rng.choice(18, num, p=probabilities())]
    kernel = ebm.BlockGibbs(ebm.fixed(two_sites, {}), [["b"], ["a"]], reversible=True)
    start, kwargs = {"a": jnp.asarray(x[:, 0]), "b": jnp.asarray(x[:, 1:])}, {"num_rows": num}
    state = kernel.init(jax.random.key(3), 0, start, (), kwargs)
    y = STATES[numbers(jax.jit(lambda s: kernel.sample(s, (), kwargs))(state).z)]
    for f, g in ((0, 1), (1, 2), (0, 2)):
        terms = x[:, f] * y[:, g] - x[:, g] * y[:, f]
        assert abs(terms.mean()) < 4 * terms.std() / np.sqrt(num), (f, g)


def test_a_coloured_block_that_is_no_polynomial_keeps_its_law():
    """Three colours of one, two and three units, so that two of them are padded."""
    couplings = np.triu(np.random.default_rng(2).normal(size=(6, 6)), 1)
    colors = np.array([2, 1, 1, 0, 2, 2])  # the first unit is the last drawn
    couplings = couplings * (colors[:, None] != colors)

    def log_density(s):
        return jnp.sum(jnp.sin(s + 1.0) * (jnp.cos(1.0 * s) @ couplings), -1) + 0.3 * s[:, 0]

    def model(num_rows=1):
        with numpyro.plate("data", num_rows):
            s = numpyro.sample("s", ebm.Counting(2, (6,)))
            ebm.energy("E", -jnp.log(jnp.exp(log_density(s))))  # of no form

    kernel = ebm.BlockGibbs(ebm.fixed(model, {}), colors={"s": colors})
    (plan,) = kernel.plan()
    assert plan.kind == "coloured" and plan.degree == np.inf and plan.form is None
    s = np.asarray(last(kernel, 6_000, 0, 8).z["s"])
    states = np.indices((2,) * 6).reshape(6, -1).T
    p = np.asarray(jax.nn.softmax(log_density(jnp.asarray(states))))
    found = np.bincount(s @ 2 ** np.arange(6)[::-1], minlength=64)
    z = (found - len(s) * p) / np.sqrt(len(s) * p * (1 - p))
    assert np.abs(z).max() < 4.5


def flat(num_rows=20_000):
    with numpyro.plate("data", num_rows):
        x = numpyro.sample("x", ebm.Lebesgue())
        ebm.energy("E", 0.0 * x)


def test_friction_is_the_rate_at_which_momentum_is_forgotten():
    """Without a force a step of ε keeps exp(-γ ε) of the momentum, of any mass."""
    kernel = ebm.UnderdampedLangevin(
        ebm.fixed(flat, {}), step_size=0.4, friction=2.0, adapt_step_size=False
    )
    state = kernel.init(jax.random.key(3), 0, None, (), {})
    heavy = state.adapt_state._replace(inverse_mass_matrix=jnp.full(1, 0.25))
    new = jax.jit(lambda s: kernel.sample(s, (), {}))(state._replace(adapt_state=heavy))
    (old,), (momentum,) = (jax.tree.leaves(s.memory[0]) for s in (state, new))
    assert np.corrcoef(old, momentum)[0, 1] == pytest.approx(np.exp(-0.8), abs=0.02)
    assert np.std(momentum) == pytest.approx(1.0, abs=0.02)


def test_the_step_size_after_the_warm_up_is_the_averaged_one():
    adaptation = Adaptation(16, acceptance_tuner(0.6, 0.2), True)
    state = adaptation.init(0.1, 3, 2, False, None)
    for i in range(16):
        state = adaptation.update(jnp.array(i), state, jnp.array([0.9, 0.1, 0.5 + 0.4 * (i % 2)]))
    averaged, last_one = (
        np.exp(getattr(state.tuner, k)) for k in ("log_step_size_avg", "log_step_size")
    )
    np.testing.assert_allclose(state.step_size, averaged, rtol=1e-6)
    assert np.all(np.abs(np.log(averaged / last_one)) > 1e-3)


def test_the_energy_error_of_mclmc_is_for_each_dimension(monkeypatch):
    kernel = ebm.MCLMC(ebm.fixed(flat, {}), adjusted=False, target_energy_variance=1e-3)
    x = {"x": jnp.zeros(7)}
    moved = SimpleNamespace(position=x, logdensity=0.0, logdensity_grad=x, momentum=x)
    info = SimpleNamespace(energy_change=jnp.array(0.2), nonans=jnp.array(True))
    made = SimpleNamespace(build_kernel=lambda: lambda *args: (moved, info))
    monkeypatch.setattr("numpyro_ebm.mcmc.mclmc.blackjax", SimpleNamespace(mclmc=made))
    adapted = SimpleNamespace(inverse_mass_matrix=jnp.ones(7), trajectory_length=1.0)
    chain = Chain(x, jnp.array(0.0), x, x)
    _, found = kernel._move(None, chain, None, 0.1, adapted, 0)
    np.testing.assert_allclose(found.statistic, 0.2**2 / (7 * 1e-3), rtol=1e-6)
    assert not found.diverging
    info.nonans = jnp.array(False)
    assert kernel._move(None, chain, None, 0.1, adapted, 0)[1].diverging


def test_statistics_of_the_warm_up():
    """Stan's (n s² + 5e-3) / (n + 5), of the mean over rows of their own variances; new means.

    The length of trajectories is in units of the preconditioner, where every variance is one.
    """
    assert running_mean(jnp.array(5.0), 1.0, jnp.array(3), 10) == 4.0
    assert running_mean(jnp.array(5.0), 1.0, jnp.array(10), 10) == 1.0
    tuner = acceptance_tuner(0.6)
    adaptation = Adaptation(40, tuner, True, adapt_mass_matrix=True, length_factor=1.5)
    state = adaptation.init(0.1, 2, 3, True, None)
    x = np.random.default_rng(0).normal(size=(4, 2, 3)) + 10.0 * np.arange(2)[:, None]
    for draw in x:
        state = adaptation._gather(state, jnp.asarray(draw, jnp.float32))
    expected = (8 * x.var(0, ddof=1).mean(0) + 5e-3) / (8 + 5)
    found = adaptation._end_window(state)
    np.testing.assert_allclose(found.inverse_mass_matrix, expected, rtol=1e-3)
    np.testing.assert_allclose(found.trajectory_length, 1.5 * 3**0.5, rtol=1e-5)


def test_jacobians_of_replicas_are_no_energies():
    """At every temperature a density has its whole Jacobian; energies alone are tempered."""

    def model():
        with numpyro.plate("data", 1):
            v = numpyro.sample("v", dist.Exponential(1.5))
            ebm.energy("E", v**2)

    _, base, likelihood = ebm.ReplicaExchange(ebm.fixed(model, {}))._target((), {})
    u = {"v": jnp.log(jnp.array([2.0]))}
    np.testing.assert_allclose(jax.vmap(base)(u), np.log(1.5) - 3.0 + np.log(2.0), rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(likelihood)(u), -4.0, rtol=1e-6)


def test_annealing_by_noise_has_its_temperature_step_and_end():
    """exp(-β E) at β = (σ₀ / σ)², by steps ε ∝ σ²: of v²/2 the variance is 1 / β(1 - ε β / 2).

    At the end v + σ² ∇ log p of the last level, which is 1 - σ² β times v.
    """

    def model(num_rows=20_000):
        with numpyro.plate("data", num_rows):
            v = numpyro.sample("v", ebm.Lebesgue())
            ebm.energy("E", 0.5 * v**2)

    kernel = ebm.AnnealedLangevin(
        ebm.fixed(model, {}), [3.0, 2.0], noise_scale=0.6, num_steps=60, step_size=0.5
    )
    state = kernel.init(jax.random.key(3), 0, None, (), {})
    found = np.var(jax.jit(lambda s: kernel.sample(s, (), {}))(state).z["v"])
    beta, eps = (0.6 / 2) ** 2, 0.5 * 2**2
    expected = (1 - 4 * beta) ** 2 / (beta * (1 - eps * beta / 2))
    np.testing.assert_allclose(found, expected, rtol=4 * np.sqrt(2 / 20_000))


def test_a_row_of_which_one_site_moves_is_not_frozen():
    def model():
        with numpyro.plate("data", 3):
            v, w = (numpyro.sample(name, ebm.Lebesgue()) for name in "vw")
            ebm.energy("E", 0.5 * (v**2 + w**2))

    moving = np.random.default_rng(0).normal(size=(1, 10, 3))
    held = moving * np.array([1.0, 1.0, 0.0])  # the third row holds still in both sites
    row_model = read_fixed_model(ebm.fixed(model, {}), (), {})
    found = assess_draws(row_model, {"v": held, "w": 0.0 * moving}, {})
    assert found.frozen.tolist() == [0, 0, 1]


def test_the_worst_statistic_of_a_row_is_its_r_hat():
    rng = np.random.default_rng(0)
    well, apart = rng.normal(size=(2, 2, 200, 3, 1))
    apart[1, :, 1] += 20.0
    found = _r_hat([well, apart], np.array([False, False, True]))
    assert abs(found[0] - 1.0) < 0.1 and found[1] > 3 and found[2] == np.inf


@pytest.mark.parametrize("place", [0, -1])
def test_coordinates_from_end_to_end_are_looked_at(place):
    """Of more than are taken: chains that are apart in the first one, or in the last."""
    x = np.random.default_rng(5).normal(size=(2, 200, 3, 50))
    x[1, :, 1, place] += 20.0
    found = _r_hat([x], np.zeros(3, bool))
    assert np.all(found[[0, 2]] < 1.2) and found[1] > 3
