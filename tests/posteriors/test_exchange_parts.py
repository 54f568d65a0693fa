# SPDX-License-Identifier: Apache-2.0
"""The parts of an exchange chain by hand: warm-up, auxiliary chains and what these tell."""

from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from exchange_cases import gaussian
from numpyro.infer.mcmc import MCMCKernel

import numpyro_ebm as ebm
from numpyro_ebm.mcmc.adaptation import warmup_windows
from numpyro_ebm.posteriors.exchange import kernel
from numpyro_ebm.posteriors.exchange.auxiliary import EnumerationSimulator
from numpyro_ebm.posteriors.exchange.auxiliary_chain import AuxiliaryWarmup, ChainSimulator
from numpyro_ebm.posteriors.exchange.chain import start_chain, step_chain
from numpyro_ebm.posteriors.exchange.target import ExchangeTarget
from numpyro_ebm.posteriors.exchange.warmup import ExchangeAdaptation, reference_schedule

KEY = jax.random.key(4)


def test_the_schedule_of_references_is_as_told():
    """Half a walk, of which the second half is the centre; K data sets, and a step to look."""
    found = reference_schedule(100, 3)
    steps = np.arange(100)
    np.testing.assert_array_equal(np.flatnonzero(found.in_center), steps[25:50])
    np.testing.assert_array_equal(np.flatnonzero(found.is_paused), steps[50:54])
    np.testing.assert_array_equal(found.slot[48:54], [-1, -1, 0, 1, 2, -1])
    assert np.all(np.delete(found.slot, [50, 51, 52]) == -1)
    np.testing.assert_array_equal(np.flatnonzero(found.restarts), [52])
    np.testing.assert_array_equal(found.windows[:, :50], warmup_windows(50))
    assert not found.windows[:, 50:54].any()
    np.testing.assert_array_equal(found.windows[:, 54:], warmup_windows(46))
    walk = reference_schedule(100, 0)
    assert not walk.is_paused.any() and np.all(walk.slot == -1)
    np.testing.assert_array_equal(walk.windows, warmup_windows(100))


def test_a_window_of_a_walk_gives_its_covariance_and_keeps_its_volume():
    """Of each group; a tenth of the draws in each dimension count against five for correlations."""
    adaptation = ExchangeAdaptation(100, 0, 0.3, True, True, 0.7)
    x = np.random.default_rng(1).normal(size=(30, 2, 3)) @ np.array(
        [[1.0, 0.9, 0.0], [0.0, 0.5, 0.0], [0.2, 0.0, 3.0]]
    )
    x[:, 1] *= 5.0
    state = adaptation.init(jnp.zeros((2, 3)), None, None)
    gather = jax.jit(adaptation._gather)
    for draw in x:
        state = gather(state, jnp.asarray(draw, jnp.float32))
    found = jax.jit(adaptation._end_window)(state)
    effective = 30 / (10 * 3)
    for i in range(2):
        full = np.cov(x[:, i].T)
        expected = (effective * full + 5 * np.diag(np.diag(full))) / (effective + 5)
        expected = (30 * expected + 5e-3 * np.eye(3)) / 35
        scale = np.asarray(found.scale[i], float)
        np.testing.assert_allclose(scale @ scale.T, expected, rtol=1e-3, atol=1e-4)
        volume = np.prod(np.diag(scale)) ** (1 / 3)
        np.testing.assert_allclose(found.step_size[i] * volume, 0.7, rtol=1e-4)
        current = np.exp(found.tuner.log_step_size[i])
        np.testing.assert_allclose(current, found.step_size[i], rtol=1e-4)
    assert np.all(np.asarray(found.moments[2]) == 0)


def test_a_langevin_proposal_has_its_references_at_the_mean_of_the_walk():
    """The walk's second half; the chain stands still meanwhile; then steps begin anew."""
    num, adaptation = 40, ExchangeAdaptation(40, 3, 0.4, True, False, 1.0)
    x = np.random.default_rng(2).normal(size=(num, 1, 2)).astype("float32")
    state = adaptation.init(jnp.zeros((1, 2)), {"v": jnp.zeros((3, 5))}, jnp.zeros((3, 5)))

    @jax.jit
    def step(i, state, at):
        data = {"v": jnp.full(5, 1.0 * i)}
        state = adaptation.store_reference(i, state, data, jnp.full(5, 10.0 * i))
        return adaptation.update(i, state, jnp.array([0.9]), lambda: at)

    states = [state]
    for i in range(num + 2):
        states.append(step(jnp.array(i), states[-1], x[min(i, num - 1)]))
    last = states[-1]
    np.testing.assert_allclose(last.reference, x[10:20].mean(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(last.references["v"][:, 0], [20.0, 21.0, 22.0])
    np.testing.assert_array_equal(last.baselines[:, 0], [200.0, 210.0, 220.0])
    assert [bool(s.has_gradient) for s in states[21:25]] == [False, False, True, True]
    np.testing.assert_array_equal(states[20].step_size, states[22].step_size)  # paused
    assert states[20].step_size > 2 and np.all(states[23].step_size == 1.0)
    assert np.all(states[23].tuner.num_steps == 0) and states[25].step_size > 1
    jax.tree.map(np.testing.assert_array_equal, states[-1], states[num])  # the warm-up is over


class Doubled(NamedTuple):
    i: Any
    z: Any
    adapt_state: Any
    mean_accept_prob: Any


class Doubling(MCMCKernel):
    """Multiplies a site by 1.5 in its warm-up, by 2 after it; adapts a number, by one a step."""

    sample_field = "z"

    def __init__(self, model):
        self.model = model

    def init(self, rng_key, num_warmup, init_params, model_args=(), model_kwargs=None):
        self.num_warmup = num_warmup
        start = jnp.array(1.0 * num_warmup)
        return Doubled(jnp.array(0), init_params, start, jnp.array(0.25))

    def sample(self, state, model_args, model_kwargs):
        warms_up = state.i < self.num_warmup
        z = {name: jnp.where(warms_up, 1.5, 2.0) * x for name, x in state.z.items()}
        adapted = jnp.where(warms_up, state.adapt_state + 1, state.adapt_state)
        return state._replace(i=state.i + 1, z=z, adapt_state=adapted)

    def get_constrain_fn(self, model_args, model_kwargs):
        return lambda z: z


def test_an_auxiliary_chain_takes_its_steps_and_hands_on_what_it_adapts():
    """Half way after half of them; where the warm-up of the exchange chain is, there is its own."""
    data = jnp.array([1.0, -2.0, 0.5])
    target, simulator = ExchangeTarget(gaussian, (data,), {}), ChainSimulator(Doubling, 5)
    params = {"theta": jnp.array(1.3)}
    at = target, params, {"v": data}
    assert simulator.start(KEY, target, {"theta": jnp.array(0.1)}, 4) == 20.0
    # Steps left in a warm-up of 4 times 5, from where it is.
    for i, adapted, expected in ((0, 7.0, 12.0), (3, 22.0, 27.0), (4, 27.0, 27.0), (9, 27.0, 27.0)):
        warmup = AuxiliaryWarmup(4, jnp.array(i), jnp.array(adapted))
        halfway, end, report = simulator.simulate(KEY, *at, warmup)
        factor = 1.5 if i < 4 else 2.0
        np.testing.assert_allclose(halfway["v"], data * factor**2)
        np.testing.assert_allclose(end["v"], data * factor**5)
        assert report.adapt_state == expected and report.accept_prob == 0.25
    moved = simulator.transition(KEY, *at, AuxiliaryWarmup(4, jnp.array(0), jnp.array(7.0)))
    np.testing.assert_allclose(moved["v"], data * 2.0)  # it adapts nothing


@pytest.mark.parametrize(("by_row", "num_warmup", "factor"), [(False, 0, 2.0), (True, 3, 1.5)])
def test_the_trace_of_an_auxiliary_chain_is_what_it_did(by_row, num_warmup, factor):
    """Of data of two coordinates that double, or grow by half: all its figures follow."""

    def model(data):
        with numpyro.plate("groups", len(data)) if by_row else numpyro.handlers.mask(mask=True):
            theta = numpyro.sample("theta", dist.Gamma(2.0, 1.0))
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue((2,)), obs=data)
            ebm.energy("E", 0.5 * theta * jnp.sum(v**2, -1))

    x = np.array([[0.3, -0.6], [0.15, 0.1], [0.9, 0.03]])
    data = jnp.asarray(x)
    target = ExchangeTarget(model, (data,), {}, by_row)
    adaptation = ExchangeAdaptation(num_warmup, 0, 0.4, False, False, 0.3)
    simulator = ChainSimulator(Doubling, 2)
    z = {"theta": jnp.full(3 if by_row else (), 0.2)}

    @jax.jit
    def two_steps(key):
        state = start_chain(key, z, target, adaptation, simulator, 0)
        state = state._replace(fictitious=data + 1.0)
        return step_chain(state, target, adaptation, simulator, 0)

    state = two_steps(KEY)
    told, halfway, end = state.auxiliary, factor * x, factor**2 * x
    apart = x - x.mean(0)
    mean = (lambda a: a.mean(1)) if by_row else np.mean
    close = np.testing.assert_allclose
    recoil = mean(apart * (end - halfway)) / mean(apart**2)
    for found, expected in (
        (told.recoil, recoil),
        (told.movement, mean((end - halfway) ** 2)),
        (told.distance, mean((end - x) ** 2)),
        (told.spread, mean((end - x - 1) ** 2)),
        (told.accept_prob, 0.25),
        (state.fictitious, end),
        (state.auxiliary_adapt_state, 2 * num_warmup + (2 if num_warmup else 0)),
    ):
        close(found, expected, rtol=1e-5)
    new, old = np.exp(np.asarray(told.proposal)), np.exp(0.2)
    new, old = (new[:, 0], old) if by_row else (new[0], old)
    total = (lambda a: a) if by_row else np.sum
    for i, y in enumerate((x, halfway, end)):
        rows = -0.5 * np.sum(y**2, 1)
        close(told.log_density[i], new * total(rows) / (1 if by_row else 3), rtol=1e-4)
        close(told.log_ratio[i], (new - old) * total(rows), rtol=1e-3, atol=1e-4)
    ratio = np.log(new / old) * 2 - (new - old)  # Gamma(2, 1), with the Jacobian
    ratio = ratio + (new - old) * total(-0.5 * np.sum(x**2, 1) + 0.5 * np.sum(end**2, 1))
    close(state.accept_prob, np.exp(np.minimum(ratio, 0)), rtol=1e-3)
    close(state.mean_accept_prob, state.accept_prob)
    theta = np.exp(np.asarray(state.z["theta"]))
    close(state.log_density, theta * total(-0.5 * np.sum(x**2, 1)), rtol=1e-4)
    close(state.log_prior, 2 * np.log(theta) - theta, rtol=1e-4)
    close(state.potential_energy, -state.log_density - state.log_prior, rtol=1e-5)


def test_enumerated_draws_have_the_law_of_their_row():
    """Two bits with a field of each row, and a hidden one that is summed out."""

    def model(data, field):
        w = numpyro.sample("w", dist.Normal(0.0, 1.0))
        with numpyro.plate("data", len(data)):
            x = numpyro.sample("x", ebm.Counting(2, (2,)), obs=data)
            h = numpyro.sample("h", ebm.Counting(2))
            ebm.energy("E", -w * x[:, 0] * x[:, 1] * h - field * x[:, 0] + 0.4 * h)

    num = 4_000
    field = np.tile([-1.0, 2.0], num)
    args = (jnp.zeros((2 * num, 2), int), jnp.asarray(field))
    target = ExchangeTarget(model, args, {})
    draw = EnumerationSimulator(4).simulate
    run = jax.jit(lambda key, w: draw(key, target, {"w": w}, target.data, None)[1]["x"])
    drawn = np.asarray(run(KEY, 1.7))
    states = np.indices((2, 2)).reshape(2, -1).T
    for i in (0, 1):
        log_p = field[i] * states[:, 0] + np.logaddexp(0, 1.7 * states.prod(1) - 0.4)
        p = np.exp(log_p) / np.exp(log_p).sum()
        counts = np.bincount(drawn[i::2] @ [2, 1], minlength=4)
        assert np.all(np.abs(counts - num * p) < 4.5 * np.sqrt(num * p * (1 - p)))


def test_a_proposal_begins_at_the_best_scale_of_its_dimension(monkeypatch):
    """2.38 / √d and 0.44 down to 0.234 of a walk; a step of one and 0.4 along a gradient."""
    seen = []
    monkeypatch.setattr(kernel, "ExchangeAdaptation", lambda *args: seen.append(args))
    groups, z = SimpleNamespace(num_groups=2), {"a": np.zeros((2, 3)), "b": np.zeros(2)}
    walk = ebm.Exchange(gaussian, ebm.BlockGibbs)
    walk._num_warmup = 100
    walk._adaptation(groups, z)
    assert seen[0] == (100, 0, pytest.approx(0.234 + 0.206 / 4), True, True, pytest.approx(1.19))
    told = ebm.Exchange(gaussian, ebm.BlockGibbs, step_size=0.3, target_accept_prob=0.5)
    told._adaptation(groups, z)
    assert seen[1] == (0, 0, 0.5, True, True, 0.3)
    along = ebm.Exchange(gaussian, ebm.BlockGibbs, proposal="langevin", adapt_covariance=False)
    along._num_warmup = 100
    # As many references as make 256 rows; of rows with a log Z each 64; a quarter of the warm-up.
    for rows, covariates, num in ((100, (), 3), (100, ("x",), 24), (1, (), 24), (300, (), 1)):
        groups.row_model = SimpleNamespace(num_rows=rows, covariates=covariates)
        along._adaptation(groups, z)
        assert seen[-1] == (100, num, 0.4, True, False, 1.0)
