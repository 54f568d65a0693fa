# SPDX-License-Identifier: Apache-2.0
"""Single steps and levels of the kernels, written out in NumPy."""

import warnings
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import numpyro_ebm as ebm
from numpyro_ebm.language.handlers import uncondition
from numpyro_ebm.mcmc.adaptation import (
    Adaptation,
    acceptance_tuner,
    adapted_steps,
    warmup_windows,
)
from numpyro_ebm.mcmc.convergence import Convergence, assess_draws, warn_of_convergence
from numpyro_ebm.mcmc.replica_ladder import LadderAdaptation
from numpyro_ebm.mcmc.sampling import complete_draws
from numpyro_ebm.mcmc.watch import Watch
from numpyro_ebm.model.reading import read_fixed_model
from numpyro_ebm.samplers import swendsen_wang

NUM = 500
MASS = np.array([0.3, 2.0])  # the inverse, of v[0] and v[1]
LEVELS = np.array([3.0, 1.5, 0.5])


def bent(num_rows=NUM, sigma=1.0):
    with numpyro.plate("data", num_rows):
        v = numpyro.sample("v", ebm.Lebesgue((2,)))
        ebm.energy("E", 0.25 * jnp.sum(v**4, -1) / sigma**2 - 0.5 * v[:, 0] * v[:, 1])


MODEL = ebm.fixed(bent, {})


def log_density(v, sigma=1.0):
    return 0.5 * v[:, 0] * v[:, 1] - 0.25 * np.sum(v**4, -1) / sigma**2


def slope(v):
    return 0.5 * v[:, ::-1] - v**3


def step(kernel, state):
    return jax.jit(lambda s: kernel.sample(s, (), {}))(state)


def start(kernel, mass=None, num_warmup=0):
    v = np.random.default_rng(0).normal(size=(NUM, 2)).astype("float32")
    state = kernel.init(jax.random.key(3), num_warmup, {"v": jnp.asarray(v)}, (), {})
    if mass is not None:
        adapted = state.adapt_state._replace(inverse_mass_matrix=jnp.asarray(mass, "float32"))
        state = state._replace(adapt_state=adapted)
    return v, state


def test_mala_with_a_preconditioner_accepts_by_its_own_proposals():
    """Around v + ε M⁻¹ g with covariance 2 ε M⁻¹, there and back."""
    eps = 0.3
    kernel = ebm.MALA(MODEL, eps, adapt_step_size=False, adapt_mass_matrix=True)
    x, state = start(kernel, MASS)
    new = step(kernel, state)
    y = np.asarray(new.z["v"])
    there, back = (a + eps * MASS * slope(a) for a in (x, y))
    ratio = log_density(y) - log_density(x)
    ratio -= np.sum(((x - back) ** 2 - (y - there) ** 2) / (4 * eps * MASS), 1)
    moved = np.any(y != x, 1)
    assert 0.3 < moved.mean() < 0.95
    rate = np.exp(np.minimum(ratio, 0.0))
    np.testing.assert_allclose(new.accept_prob[moved], rate[moved], rtol=2e-3)
    noise = (y - there)[moved] / np.sqrt(2 * eps * MASS)
    weights = 1 / rate[moved]  # accepted ones have been chosen
    assert np.all(abs(np.average(noise**2, 0, weights) - 1) < 0.35)
    np.testing.assert_allclose(new.z_grad["v"], -slope(y), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(new.potential_energy, -log_density(y), rtol=1e-4, atol=1e-5)


def test_unadjusted_mclmc_walks_at_a_constant_speed_and_turns_down_the_energy():
    """z' = z + ε M^(-1/2) u with a velocity of length one, drawn at first and kept from there."""

    def slope_of_one():
        with numpyro.plate("data", NUM):
            v = numpyro.sample("v", ebm.Lebesgue((2,)))
            ebm.energy("E", -v[:, 0])

    options = {"adjusted": False, "trajectory_length": 1e9, "adapt_step_size": False}
    kernel = ebm.MCLMC(ebm.fixed(slope_of_one, {}), 0.01, **options)
    x, state = start(kernel, MASS)
    old = np.asarray(state.memory["v"])
    new = step(kernel, state)
    velocity, moved = np.asarray(new.memory["v"]), np.asarray(new.z["v"]) - x
    np.testing.assert_allclose(moved, 0.01 * np.sqrt(MASS) * old, atol=5e-4)
    for u in (old, velocity):
        np.testing.assert_allclose(np.sum(u**2, 1), 1.0, rtol=1e-4)
    assert np.all(abs(old.mean(0)) < 4 / (2 * NUM) ** 0.5)
    # u̇ = (I - u uᵀ) M^(-1/2) e / (D - 1) with e the direction of the slope.
    turned = 0.01 * MASS[0] ** 0.5 * (np.array([1.0, 0.0]) - old[:, :1] * old)
    np.testing.assert_allclose(velocity - old, turned, atol=2e-4)


def test_momenta_are_new_while_rows_settle_and_kept_after_it():
    """Before anything is gathered; then steps without friction keep them, but for the force."""
    kernel = ebm.UnderdampedLangevin(MODEL, step_size=1e-6, friction=1e-3, adapt_step_size=False)
    _, state = start(kernel, num_warmup=100)
    settling = kernel._adaptation.num_settling
    assert 1 < settling < 100
    move = jax.jit(lambda s: kernel.sample(s, (), {}))
    old = np.ravel(state.memory[0]["v"])
    for i, expected in ((settling - 1, 0.0), (settling, 1.0)):
        new = np.ravel(move(state._replace(i=jnp.array(i))).memory[0]["v"])
        assert np.corrcoef(old, new)[0, 1] == pytest.approx(expected, abs=0.15)


BY_NOISE = {"noise_scale": 0.8, "step_size": 0.2}
# Options, the model's argument, the step sizes, 1/τ² and the variance of the last step.
ANNEALED = {
    "noise argument": (
        {"noise_scales": LEVELS, "noise_argument": "sigma"},
        (LEVELS, 0.1 * LEVELS**2, None, 0.25),
    ),
    "one energy": (
        {"noise_scales": LEVELS, **BY_NOISE},
        ((0.8 / LEVELS) ** 2, 0.2 * LEVELS**2, None, 0.25),
    ),
    "temperatures": (
        {"inverse_temperatures": [0.1, 1.0], **BY_NOISE},
        ([0.1, 1.0], [2.0, 0.2], None, 0.64),
    ),
    "temperatures alone": (
        {"inverse_temperatures": [0.1, 0.5], "step_size": 0.2},
        ([0.1, 0.5], [2.0, 0.4], None, None),
    ),
    "recovery": (
        {"noise_scales": LEVELS, "noise_argument": "sigma", "recover": True, "denoise": False},
        (
            LEVELS[1:],
            0.1 / (1 / np.array([6.75, 2.0]) + 1 / LEVELS[1:] ** 2),
            1 / np.array([6.75, 2.0]),
            None,
        ),
    ),
}


@pytest.mark.parametrize("name", ANNEALED)
def test_the_levels_of_annealed_langevin_are_as_written(name):
    options, expected = ANNEALED[name]
    kernel = ebm.AnnealedLangevin(MODEL, **options)
    found = kernel._levels, kernel._step_sizes, kernel._tethers, kernel._denoise_variance
    for x, y in zip(found, expected, strict=True):
        assert (x is None) == (y is None)
        if y is not None:
            np.testing.assert_allclose(x, y, rtol=1e-12)
    assert kernel._init_scale == (3.0 if "noise_scales" in options else 1.0)


@pytest.mark.parametrize("name", ["noise argument", "temperatures"])
def test_a_level_is_the_energy_at_its_noise_or_temperature(name):
    kernel = ebm.AnnealedLangevin(MODEL, **ANNEALED[name][0])
    v, state = start(kernel)
    by_noise = name == "noise argument"
    last = log_density(v, 0.5) if by_noise else log_density(v)
    np.testing.assert_allclose(state.potential_energy, -last, rtol=1e-4, atol=1e-4)
    _, one_row = kernel._target((), {}, state.z)
    found = jax.vmap(one_row, (0, None))({"v": jnp.asarray(v)}, jnp.array(0.3))
    expected = log_density(v, 0.3) if by_noise else 0.3 * log_density(v)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


BONDS = np.array([[0.0, 0.9, -0.6], [0.0, 0.0, 1.3], [0.0, 0.0, 0.0]])
FIELD = np.array([0.5, -1.0, 0.3])
STATES = np.indices((2, 2, 2)).reshape(3, -1).T


def magnet(num_rows=2_000):
    with numpyro.plate("data", num_rows):
        s = numpyro.sample("s", ebm.Counting(2, (3,)))
        ebm.energy("E", -jnp.sum((s @ BONDS) * s, -1) - s @ FIELD)


def test_replicas_of_a_kernel_keep_the_law_of_each_temperature():
    """Exact draws at every β are exact draws after two steps, one for each half of the pairs."""
    betas, rng = np.array([1.0, 0.5, 0.1]), np.random.default_rng(1)
    kernel = ebm.ReplicaExchange(
        ebm.fixed(magnet, {}), betas, kernel=ebm.BlockGibbs, adapt_ladder=False
    )
    state = kernel.init(jax.random.key(2), 0, None, (), {})
    energy = -np.sum((STATES @ BONDS) * STATES, -1) - STATES @ FIELD
    laws = np.exp(-betas[:, None] * energy)
    laws /= laws.sum(1, keepdims=True)
    draws = np.stack([STATES[rng.choice(8, 2_000, p=p)] for p in laws])
    inner, visited = state.memory
    inner = inner._replace(z={"s": jnp.asarray(draws, inner.z["s"].dtype)})
    state = state._replace(memory=(inner, visited))
    move = jax.jit(lambda s: kernel.sample(s, (), {}))
    first = move(state)
    new = move(first)
    for k, p in enumerate(laws):
        found = np.bincount(np.asarray(new.memory[0].z["s"][k]) @ [4, 2, 1], minlength=8)
        z = (found - 2_000 * p) / np.sqrt(2_000 * p * (1 - p))
        assert np.abs(z).max() < 4.5
    for after in (first, new):  # a swap of the coldest pair, and one of the other
        np.testing.assert_array_equal(after.z["s"], after.memory[0].z["s"][0])
        at = energy[np.asarray(after.z["s"]) @ [4, 2, 1]]
        np.testing.assert_allclose(after.potential_energy, at, rtol=1e-4, atol=1e-5)
    # Of neighbours in exact draws α is E min(1, exp((β - β') (E - E'))).
    gaps = np.subtract.outer(energy, energy)
    for k in range(2):
        rates = np.exp(np.minimum((betas[k] - betas[k + 1]) * gaps, 0.0))
        rate = laws[k] @ rates @ laws[k + 1]
        assert first.swap_prob[k] == pytest.approx(rate, abs=0.04)
    mean = (first.swap_prob + new.swap_prob) / 2
    np.testing.assert_allclose(new.mean_swap_prob, mean, rtol=1e-4)
    assert np.all(new.round_trips == 0) and np.all(new.memory[1][2]) and new.i == 2


def test_base_measures_of_replicas_are_not_tempered():
    def model(num_rows=1):
        with numpyro.plate("data", num_rows):
            s = numpyro.sample("s", dist.Bernoulli(0.3).expand([3]).to_event(1))
            ebm.energy("E", jnp.sum(s, -1) ** 2)

    kernel = ebm.ReplicaExchange(ebm.fixed(model, {}), kernel=ebm.BlockGibbs, num_replicas=2)
    s = STATES.reshape(2, 4, 3)
    found, _ = kernel._replicas({"s": jnp.asarray(s)}, (), {"num_rows": 4})
    base = np.log(np.where(s, 0.3, 0.7)).sum(-1)
    np.testing.assert_allclose(found.logprior, base, rtol=1e-5)
    np.testing.assert_allclose(found.loglikelihood, -(s.sum(-1) ** 2))


def test_a_warm_up_begins_its_steps_anew_where_a_window_ends():
    """At the step size in use, with nothing left of what the averaging has seen."""
    adaptation = Adaptation(100, acceptance_tuner(0.6, 0.2), True, adapt_mass_matrix=True)
    state = adaptation.init(0.1, 2, 1, True, None)
    ends = np.flatnonzero(warmup_windows(100)[1])
    update = jax.jit(
        lambda i, s: adaptation.update(i, s, jnp.array([0.9, 0.2]), lambda: jnp.ones((2, 1)))
    )
    for i in range(ends[0] + 1):
        before, state = state, update(jnp.array(i), state)
    fresh = adaptation.tuner.init(state.step_size)
    jax.tree.map(np.testing.assert_array_equal, tuple(state.tuner), tuple(fresh))
    followed = adaptation.tuner.update(before.tuner, jnp.array([0.9, 0.2]))
    np.testing.assert_allclose(state.step_size, adaptation.tuner.current(followed), rtol=1e-6)
    assert adaptation.num_settling == np.argmax(warmup_windows(100)[0])
    assert Adaptation(7, acceptance_tuner(0.6), True).num_settling == adapted_steps(7) == 4


def test_a_ladder_counts_what_its_pairs_reject():
    adaptation = LadderAdaptation(100, acceptance_tuner(0.75), True, True)
    state = adaptation.init(np.array([1.0, 0.4, 0.1]), 0.2, 2)
    for alpha in ([0.9, 0.2], [0.5, 0.4]):
        state = adaptation._gather(state, jnp.array(alpha))
    np.testing.assert_allclose(state.rejection, [0.6, 1.4], rtol=1e-6)
    assert state.num_steps == 2
    found = adaptation._end_window(state)
    assert np.all(np.asarray(found.rejection) == 0) and found.num_steps == 0


def told(watch, t, energy, sums=None, largest=1.0):
    """What a look says, with the sums of rows that have all moved."""
    energy = np.asarray(energy, float)
    sums = t + np.arange(energy.size, dtype=float) if sums is None else sums
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        watch._look(t, energy, np.reshape(sums, energy.shape), largest)
    return " ".join(str(x.message) for x in found)


def test_a_look_tells_each_of_what_may_be_wrong():
    rows, fall = np.zeros((2, 15)), np.full((2, 15), 1.5)
    watch = Watch("Kernel", 0, True)
    assert not told(watch, 0, rows) and not told(watch, 25, rows)
    assert "still fall, by 1.5 nats in the last 75 steps" in told(watch, 100, rows - fall)
    assert not told(watch, 400, rows - fall - 0.9)  # too little
    partly = rows - 10.0 - np.where(np.arange(15) < 2, 0.0, 5.0)
    assert "energies still fall" in told(watch, 1_600, rows - 10.0)
    assert not told(watch, 6_400, partly)  # 2 of 15 do not fall
    bad = rows.copy()
    bad[1, [3, 7]] = np.inf
    assert "not finite in 2 of 15 rows" in told(watch, 25_600, bad)
    assert "energies of 1 of 15 rows are so large, 1e+20" in told(
        Watch("Kernel", 0, True), 0, np.where(np.arange(15) == 4, -1e20, rows)
    )
    held = Watch("Kernel", 0, True), Watch("Kernel", 0, False)  # of kernels that may stay
    for watch in held:
        told(watch, 25, rows, np.zeros(30))
    stays = np.tile(np.where(np.arange(15) < 3, 0.0, 1.0), 2)
    assert "3 of 15 rows did not move in 75 steps" in told(held[0], 100, rows, stays)
    assert not told(held[1], 100, rows, stays)
    chains = Watch("Kernel", 0, True, "chains")
    assert not told(chains, 0, np.zeros(4)) and "nan" not in told(chains, 25, np.ones(4))
    assert "not finite in 1 of 4 chains" in told(chains, 100, [0.0, np.nan, 0.0, 0.0])


def test_what_an_ordinary_model_observes_is_tempered_and_its_prior_is_not():
    def model(y):
        scale = numpyro.sample("scale", dist.Exponential(2.0))
        numpyro.sample("y", dist.Normal(0.0, scale), obs=y)
        numpyro.factor("half", -0.5 * scale)

    kernel, y = ebm.ReplicaExchange(model), jnp.array([0.5, -1.5])
    _, base, likelihood = kernel._target((y,), {})
    z = {"scale": jnp.log(jnp.array([2.0]))}
    np.testing.assert_allclose(jax.vmap(base)(z), np.log(2.0) - 4.0 + np.log(2.0), rtol=1e-5)
    of_data = -0.5 * np.sum(y**2) / 4 - 2 * np.log(2.0 * np.sqrt(2 * np.pi)) - 1.0
    np.testing.assert_allclose(jax.vmap(likelihood)(z), of_data, rtol=1e-5)


def test_sums_over_latent_sites_are_tempered_and_their_base_is_not():
    """log Σ over h without energies, and what the energies add to it."""

    def model():
        with numpyro.plate("data", 2):
            v = numpyro.sample("v", dist.Normal(0.0, 2.0))
            h = numpyro.sample("h", dist.Bernoulli(0.3))
            ebm.energy("E", 0.7 * v * h + v**2)

    _, base, likelihood = ebm.ReplicaExchange(ebm.fixed(model, {}))._target((), {})
    v = np.array([0.5, -1.0])
    prior = -0.125 * v**2 - np.log(2.0 * np.sqrt(2 * np.pi))
    rows = {"v": jnp.asarray(v)}
    np.testing.assert_allclose(jax.vmap(base)(rows), prior, rtol=1e-5)
    added = np.log(0.7 + 0.3 * np.exp(-0.7 * v)) - v**2
    np.testing.assert_allclose(jax.vmap(likelihood)(rows), added, rtol=1e-4)


def test_sites_that_no_chain_moves_are_drawn_given_the_others():
    """Each draw and row at its own v; deterministic sites are replayed."""

    def model():
        with numpyro.plate("data", 2):
            v = numpyro.sample("v", ebm.Lebesgue())
            h = numpyro.sample("h", ebm.Counting(2))
            numpyro.deterministic("both", v * h)
            ebm.energy("E", 0.5 * v**2 - v * h)

    row_model = read_fixed_model(ebm.fixed(model, {}), (), {})
    v = np.tile([[-1.0, 0.5], [2.0, 0.0]], (3_000, 1))
    found = complete_draws(jax.random.key(4), row_model, {"v": jnp.asarray(v)}, 6_000)
    np.testing.assert_array_equal(found["v"], v.astype("float32"))
    np.testing.assert_allclose(found["both"], v * found["h"], rtol=1e-6)
    p = 1 / (1 + np.exp(-np.array([[-1.0, 0.5], [2.0, 0.0]])))
    means = np.asarray(found["h"]).reshape(3_000, 2, 2).mean(0)
    assert np.all(abs(means - p) < 4.5 * np.sqrt(p * (1 - p) / 3_000))
    assert complete_draws(None, row_model, found, 6_000) is found


def test_what_a_run_says_of_its_rows_is_counted_by_row():
    rng = np.random.default_rng(6)
    row_model = read_fixed_model(MODEL, (), {"num_rows": 4})
    v = rng.normal(size=(2, 60, 4, 2))
    v[0, :, 1] = 0.5  # one chain of the second row stays
    v[1, :2, 2, 0] = np.nan
    energy = rng.normal(size=(2, 60, 4)).astype("float32")
    energy[0, 7, 3], energy[1, 5, 2] = 1e12, np.inf
    accept = (
        np.broadcast_to([0.5, 0.01, 0.3, 0.9], energy.shape) + np.linspace(-0.01, 0.01, 60)[:, None]
    )
    fields = {"accept_prob": accept, "diverging": energy > 1.0, "potential_energy": energy}
    found = assess_draws(row_model, {"v": v}, fields)
    assert (found.num_chains, found.num_draws) == (2, 60)
    np.testing.assert_allclose(found.acceptance, [0.5, 0.01, 0.3, 0.9], rtol=1e-6)
    assert found.not_finite.tolist() == [0, 0, 3, 0]  # two values and one energy
    assert found.unresolved.tolist() == [0, 0, 1, 1] and found.frozen.tolist() == [0, 1, 0, 0]
    assert found.diverging == pytest.approx(np.mean(energy > 1.0), rel=1e-6)
    assert np.isnan(found.largest) or found.largest == np.nanmax(np.abs(v))
    few = assess_draws(row_model, {"v": v[:1, :4]}, {"accept_prob": accept[:1, :4]})
    assert few.acceptance is None and few.r_hat is None and not few.frozen.any()
    still = assess_draws(row_model, {"v": 0 * v[:1, :5, :1].repeat(4, 2)}, {})
    assert still.frozen.tolist() == [1] * 4
    assert assess_draws(row_model, {"v": v}, fields, adjusted=False).acceptance is None


def warning(chains=2, rows=40, **changed):
    """What is said of rows that are right but for what is changed."""
    nothing = np.zeros(rows, int)
    right = Convergence(
        num_chains=chains,
        num_draws=100,
        not_finite=nothing,
        unresolved=nothing,
        frozen=nothing,
        acceptance=np.full(rows, 0.6),
        diverging=0.0,
        r_hat=np.ones(rows),
        largest=3.0,
    )
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        warn_of_convergence("It", right._replace(**changed))
    return " ".join(str(x.message) for x in found)


def test_what_is_wrong_with_a_run_is_told_from_its_threshold_on():
    def of_first(num, value, other=0, rows=40):
        return np.where(np.arange(rows) < num, value, other)

    assert not warning() and not warning(diverging=0.3)
    assert "7 draws, of 2 of 40 rows, are not finite" in warning(
        not_finite=np.array([3, 4] + [0] * 38)
    )
    assert "5 draws, of 1 of 40 rows, have energies" in warning(unresolved=of_first(1, 5))
    # A twentieth of the chains of a row may stay.
    assert not warning(chains=40, frozen=of_first(1, 2))
    assert "1 of 40 rows did not move in 3 of 40 chains" in warning(40, frozen=of_first(1, 3))
    assert "2 of 40 rows did not move. " in warning(1, frozen=of_first(2, 1))
    assert not warning(acceptance=of_first(2, 0.02, 0.6))
    low = warning(acceptance=of_first(2, 0.019, 0.6), diverging=0.25)
    assert "2 of 40 rows accept less than 2% of their proposals (the median row 0.60)" in low
    assert "25.0% of the proposals diverged" in low
    # Two halves of one chain say little of one row, and enough of a share of them.
    assert not warning(r_hat=of_first(2, 2.5, 1.0)) and not warning(4, r_hat=np.full(40, 1.99))
    assert "R-hat is above 2 in 3 of 40 rows (largest 2.5)" in warning(r_hat=of_first(3, 2.5, 1.0))
    assert "R-hat is above 2 in 1 of 40 rows" in warning(4, r_hat=of_first(1, 2.5, 1.0))


def test_sites_that_start_at_their_data_are_drawn_last():
    """Whichever come first in the model, and whatever their names; else it would be lost."""

    def model(data):
        with numpyro.plate("data", 3):
            v = numpyro.sample("v", ebm.Counting(2), obs=data)
            z = numpyro.sample("z", ebm.Counting(2))
            a = numpyro.sample("a", ebm.Counting(2))
            ebm.energy("E", v * z + 0.3 * a * v)

    free, data = uncondition(ebm.fixed(model, {}), ["v"]), jnp.array([0, 1, 1])
    assert [x.names for x in ebm.BlockGibbs(free).plan(data)] == [("z",), ("a",), ("v",)]
    with pytest.raises(ebm.ModelError, match="draws 'v' anew before"):
        early = ebm.BlockGibbs(free, [["a"], ["v"], ["z"]])
        early.init(jax.random.key(0), 0, {"v": data}, (data,), {})
    late = ebm.BlockGibbs(free, [["a", "z"], ["v"]])
    state = late.init(jax.random.key(0), 0, {"v": data}, (data,), {})
    np.testing.assert_array_equal(state.z["v"], data)


def test_clusters_are_counted_by_row(monkeypatch):
    """Of clusters that are given: a vertex of each for all of its units, counted through."""
    clusters = jnp.array([[0, 0, 2, 0], [4, 4, 4, 4], [8, 9, 10, 10]])
    monkeypatch.setattr(swendsen_wang, "_clusters", lambda *_: clusters)
    monkeypatch.setattr(swendsen_wang, "_values_of_clusters", lambda key, x, *_: 1 - x)

    def model():
        with numpyro.plate("data", 3):
            s = numpyro.sample("s", ebm.Counting(2, (4,)))
            ebm.energy("E", -0.5 * jnp.sum(s, -1))

    kernel = ebm.SwendsenWang(ebm.fixed(model, {}))
    potts = SimpleNamespace(names=("s",), values=np.tile([0, 1], (4, 1)), is_checked=True)
    kernel._potts = lambda row_model: potts
    s = jnp.array([[1, 1, 0, 1], [0, 0, 0, 0], [0, 1, 1, 1]])
    state = kernel.init(jax.random.key(1), 0, {"s": s}, (), {})
    new = kernel._step(state, (), {})
    assert new.num_clusters.tolist() == [2, 1, 3] and new.i == 1
    np.testing.assert_array_equal(new.z["s"], 1 - s)
    np.testing.assert_array_equal(new.accept_prob, 1.0)
    np.testing.assert_allclose(new.potential_energy, -0.5 * np.sum(1 - s, 1))
