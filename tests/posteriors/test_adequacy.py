# SPDX-License-Identifier: Apache-2.0
"""Auxiliary chains that are too short, and those that are not: how often the verdict is right."""

from types import SimpleNamespace
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from exchange_cases import LATTICES, Ran, bonds, ising, lattice_sums, on_grid
from numpyro.diagnostics import effective_sample_size
from numpyro.infer import MCMC, NUTS, Gibbs
from scipy import stats
from scipy.special import logsumexp

import numpyro_ebm as ebm
from numpyro_ebm.diagnostics import adequacy
from numpyro_ebm.diagnostics.prior_widths import _width, prior_widths
from numpyro_ebm.posteriors.exchange.chain import AuxiliaryTrace

NUM_STEPS = 40
short = pytest.mark.filterwarnings("ignore::numpyro_ebm.ShortAuxiliaryWarning")


def gaussian(data):
    precision = numpyro.sample("precision", dist.Gamma(2.0, 1.0))
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue((3,)), obs=data)
        ebm.energy("E", 0.5 * precision * jnp.sum(v**2, -1))


def regression(data, x):
    """Nine tenths of the variance are explained: rows look like their data without remembering."""
    slope = numpyro.sample("slope", dist.Normal(0.0, 2.0))
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", 0.5 * (v - slope * x) ** 2)


X = jnp.linspace(-3.0, 3.0, 50)
MODELS = {
    "Gaussian": (gaussian, lambda key: (jax.random.normal(key, (50, 3)),)),
    "regression": (regression, lambda key: (2 * X + jax.random.normal(key, (50,)), X)),
    "misfit": (
        regression,
        lambda key: (4 * jnp.sin(5 * X) + 3 * jax.random.normal(key, (50,)), X),
    ),
    "one lattice": (
        ising,
        lambda key: (jax.random.bernoulli(key, 0.5, (1, 5, 5)).astype(int),),
    ),
}


def verdicts(name, auxiliary, num_runs, num_steps=NUM_STEPS, num_draws=300):
    """Judgements of runs on data sets of their own, by the trace alone: draws of the prior take
    a second a run."""
    model, data = MODELS[name]
    kernel = ebm.Exchange(model, auxiliary, num_steps, step_size=0.3)
    kernel.init(jax.random.key(0), 0, None, data(jax.random.key(0)), {})

    def run(key):
        args = data(key)

        def step(state, _):
            state = kernel.sample(state, args, {})
            return state, (state.auxiliary, state.z)

        return jax.lax.scan(step, kernel.init(key, 0, None, args, {}), None, num_draws)[1]

    keys = jax.random.split(jax.random.key(1), num_runs)
    traces = jax.jit(lambda keys: jax.lax.map(run, keys, batch_size=20))(keys)
    for i, key in enumerate(keys):
        trace, z = jax.tree.map(lambda x, i=i: x[i][None], traces)
        ran: Any = Ran(kernel, data(key), trace, z)
        with mock.patch.object(adequacy, "prior_widths", lambda *_: {"": np.zeros(())}):
            found = ebm.auxiliary_adequacy(ran)
        yield found


def mala(step_size):
    return lambda model: ebm.MALA(model, step_size=step_size)


DATA = jax.random.normal(jax.random.key(11), (50, 3))


def run(auxiliary, model=gaussian, data=DATA, num_warmup=150, num_samples=300, **options):
    kernel = ebm.Exchange(model, auxiliary, NUM_STEPS, **options)
    mcmc = MCMC(kernel, num_warmup=num_warmup, num_samples=num_samples, progress_bar=False)
    mcmc.run(jax.random.key(12), data)
    return mcmc


@pytest.mark.parametrize("step_size", [1e3, 0.01])
def test_chains_that_hardly_move_give_the_prior_and_say_so(step_size):
    """1,000: few steps are accepted. 0.01: all are, and 40 of them cover a tenth of the way."""
    mcmc = run(lambda m: ebm.MALA(m, step_size, adapt_step_size=False))
    with pytest.warns(ebm.ShortAuxiliaryWarning, match="hardly move.*draws are those of the prior"):
        found = ebm.auxiliary_adequacy(mcmc)
    assert not found.is_adequate and found.correlation > 0.5 and found.movement < 0.7
    assert (found.accept_prob < 0.2) == (step_size > 1)
    assert found.step_size == pytest.approx(step_size)
    # Frozen chains give back the prior, and the width says it; the others only widen.
    right = stats.gamma(2 + 75, scale=1 / (1 + float(jnp.sum(DATA**2)) / 2)).std()
    prior = np.ptp(stats.gamma(2).interval(0.68)) / 2
    assert found.widths["precision"] > (0.6 if step_size > 1 else 1.2 * right / prior)


def assert_right(mcmc, name, mean, sd):
    """Within 4 standard errors, and the auxiliary chains move."""
    found = ebm.auxiliary_adequacy(mcmc)
    assert found.movement > 0.75 and found.correlation < 0.2, found
    draws = mcmc.get_samples(group_by_chain=True)[name]
    error = sd / effective_sample_size(np.asarray(draws)) ** 0.5
    assert abs(draws.mean() - mean) < 4 * error
    return found


def right_gaussian(data):
    exact = stats.gamma(2 + data.size / 2, scale=1 / (1 + float(jnp.sum(data**2)) / 2))
    return exact.mean(), exact.std()


@pytest.mark.parametrize("step_size", [1e3, 1e-3])
def test_the_warmup_lets_a_frozen_auxiliary_move(step_size):
    mcmc = run(mala(step_size))
    found = assert_right(mcmc, "precision", *right_gaussian(DATA))
    assert found.is_adequate
    assert 0.1 < found.step_size < 2
    # Four tests at once; the first and that of the acceptance have a constant and a slope.
    z = found.ratio_drift / found.ratio_error, found.recoil / found.recoil_error
    trace = mcmc.get_extra_fields()["auxiliary"]
    ratio = np.asarray(trace.log_ratio, float)
    accepted = np.exp(np.minimum(ratio[:, :1] - ratio[:, 1:], 0))
    x = np.stack([np.ones(len(ratio)), np.asarray(trace.proposal[:, 0], float)], 1)
    slope, wald = least_squares(x, accepted[:, 1] - accepted[:, 0])
    least = min(stats.chi2(2).sf([found.statistic, wald]).min(), *stats.chi2(1).sf(np.square(z)))
    assert found.p_value == pytest.approx(min(1.0, 4 * least), rel=1e-5)
    mean, sd = right_gaussian(DATA)
    exact = stats.gamma((mean / sd) ** 2, scale=sd**2 / mean)
    ratio = np.ptp(exact.interval(0.68)) / np.ptp(stats.gamma(2).interval(0.68))
    assert found.widths["precision"] == pytest.approx(ratio, rel=0.35)
    assert f"auxiliary: step size {found.step_size:.2g}" in mcmc.sampler.get_diagnostics_str(
        mcmc.last_state
    )


def least_squares(x, y):
    """Coefficients, and the Wald statistic of none by White's covariance of the kind HC3."""
    slope = np.linalg.lstsq(x, y)[0]
    hat = np.sum(x @ np.linalg.inv(x.T @ x) * x, 1)
    bread = np.linalg.inv(x.T @ x)
    meat = x.T * ((y - x @ slope) / (1 - hat)) ** 2 @ x
    return slope, slope @ np.linalg.solve(bread @ meat @ bread, slope)


NUM = 2_000
LAGS = {  # log of the ratio half way and at the end, of every tenth proposal; is it adequate
    "none": (None, None, True),
    "where both are rejected": (50.0, 100.0, True),
    "where it is accepted half way": (0.0, 100.0, False),
    "where it is accepted at the end": (100.0, 0.0, False),
    "where both are accepted": (-3.0, -1.0, False),
}


@short
@pytest.mark.parametrize("groups", [(), (3,)], ids=["one ratio", "a ratio a row"])
@pytest.mark.parametrize("name", LAGS)
def test_a_lag_counts_where_a_proposal_can_be_accepted(name, groups):
    """Networks at parameters of their dense phase lag by many nats, and are rejected anyhow."""
    halfway, end, is_adequate = LAGS[name]
    rng = np.random.default_rng(3)
    density, ratio = rng.normal(size=(2, 1, NUM, 3, *groups))
    ratio[:, :, 0] = 0.5
    if end is not None:
        lags = rng.random((1, NUM, *groups)) < 0.1
        density[:, :, 2] += (end - halfway) * lags
        ratio[:, :, 1] = np.where(lags, halfway, ratio[:, :, 1])
        ratio[:, :, 2] = np.where(lags, end, ratio[:, :, 2])
    per_group, one = rng.normal(size=(1, NUM, *groups)), np.ones((1, NUM, *groups))
    trace = AuxiliaryTrace(
        *map(jnp.asarray, (rng.normal(size=(1, NUM, *groups, 2)), density, ratio)),
        *map(jnp.asarray, (one, one, per_group, one, one, 1.02 * one)),
    )
    ran: Any = Ran(None, (), trace, None)
    with mock.patch.object(adequacy, "prior_widths", lambda *_: {"": np.zeros(())}):
        found = ebm.auxiliary_adequacy(ran)
    assert found.is_adequate == is_adequate, found
    if (
        name == "where it is accepted half way"
    ):  # a tenth of the acceptances is lost, or a little less
        assert 0.08 < found.acceptance_drift < 0.15


SCALES = jnp.repeat(jnp.array([0.1, 10.0]), 25)


def two_scales(data):
    """Rows whose scales are a hundred apart: no step size serves both."""
    precision = numpyro.sample("precision", dist.Gamma(2.0, 1.0))
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", 0.5 * precision * (v / SCALES) ** 2)


FROZEN = {
    "a class": (ebm.MALA, gaussian, DATA, {}),
    "momentum": (lambda m: ebm.UnderdampedLangevin(m, 1e3), gaussian, DATA, {}),
    "NUTS": (lambda m: NUTS(m, step_size=1e-4, max_tree_depth=3), gaussian, DATA, {}),
    "replicas": (ebm.ReplicaExchange, gaussian, DATA, {}),
    "bridges": (
        mala(1e3),
        gaussian,
        DATA,
        {"proposal": "langevin", "num_bridges": 3, "num_references": 10},
    ),
    "rows apart": (mala(1e3), two_scales, DATA[:, 0] * SCALES, {}),
    "a block of Gibbs": (lambda m: Gibbs([(ebm.MALA(m, 1e3), ["v"])]), gaussian, DATA, {}),
}


@short  # a right run in twenty, and 40 steps are few for spins
@pytest.mark.slow
@pytest.mark.parametrize("name", FROZEN)
def test_the_warmup_tunes_what_any_auxiliary_adapts(name):
    auxiliary, model, data, options = FROZEN[name]
    standard = DATA[:, :1] if model is two_scales else DATA
    mcmc = run(auxiliary, model, data, 300, 1_000, **options)
    assert_right(mcmc, "precision", *right_gaussian(standard))


@short
@pytest.mark.slow
def test_the_warmup_tunes_an_auxiliary_of_spins():
    data = jnp.asarray(LATTICES[3])
    states, sums = lattice_sums(3)
    total = float(jnp.sum(bonds(2.0 * data - 1.0)))
    mean, sd = on_grid(
        lambda b: b * total - len(data) * logsumexp(b[:, None] * sums, axis=1), 1e-4, 1 - 1e-4
    )
    mcmc = run(lambda m: ebm.DiscreteLangevin(m, step_size=1e-3), ising, data, 300, 1_000)
    assert_right(mcmc, "beta", mean, sd)


@pytest.mark.slow
def test_a_posterior_as_wide_as_its_prior_is_noted_and_no_fault_if_chains_move(caplog):
    """One row far from telling anything: a Gamma(2, 1) prior on a precision that is scaled away."""

    def silent(data):
        precision = numpyro.sample("precision", dist.Gamma(2.0, 1.0))
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue((3,)), obs=data)
            ebm.energy("E", 0.5 * (1 + 0.01 * precision) * jnp.sum(v**2, -1))

    def draws(key, params):
        return {"v": jax.random.normal(key, (50, 3)) / jnp.sqrt(1 + 0.01 * params["precision"])}

    mcmc = run(draws, silent, num_samples=1_000)
    with caplog.at_level("INFO", "numpyro_ebm.diagnostics.adequacy"):
        found = ebm.auxiliary_adequacy(mcmc)
    assert found.is_adequate and 0.8 < found.widths["precision"] < 1.25
    assert "as wide as the prior, by a ratio of" in caplog.text
    assert np.isnan(found.step_size)
    said = dict(line.split(maxsplit=1) for line in str(found).splitlines())
    assert said["adequate"].startswith("yes") and said["movement"].startswith(
        f"{found.movement:.2f}"
    )
    assert str(found).endswith("for 'precision'") and "step size" not in str(found)
    assert not str(found._replace(is_adequate=False)).startswith(str(found)[:24])


@pytest.mark.parametrize("name", ["Gaussian", "regression"])
def test_chains_that_move_are_adequate(name):
    found = list(verdicts(name, mala(0.6), 3, num_draws=200))
    assert sum(x.is_adequate for x in found) >= 2
    assert all(x.correlation < 0.3 for x in found)


@pytest.mark.slow
@short
@pytest.mark.parametrize("name", MODELS)
def test_right_runs_are_called_inadequate_in_a_twentieth(name):
    auxiliary = ebm.BlockGibbs if name == "one lattice" else mala(0.6)
    found = list(verdicts(name, auxiliary, 200))
    wrong = sum(not x.is_adequate for x in found) / len(found)
    print(f"{name}: {wrong:.3f} of {len(found)} right runs are called inadequate")
    assert wrong < 0.05 + 3 * (0.05 * 0.95 / len(found)) ** 0.5


@pytest.mark.slow
@short
@pytest.mark.parametrize("step_size", [1e3, 0.001, 0.003, 0.01])
@pytest.mark.parametrize("name", ["Gaussian", "regression"])
def test_runs_with_a_tenth_of_the_moves_or_less_are_found(name, step_size):
    found = list(verdicts(name, mala(step_size), 40))
    assert sum(not x.is_adequate for x in found) >= 0.95 * len(found)


def moved_gaussian(data, at):
    precision = numpyro.sample("precision", dist.Gamma(2.0, 1.0))
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue((3,)), obs=data)
        ebm.energy("E", 0.5 * precision * jnp.sum((v - at) ** 2, -1))


def test_a_trace_does_not_tell_where_the_coordinates_lie():
    """Each of them is moved by a number of its own, the model with it."""
    kernel = ebm.Exchange(moved_gaussian, lambda m: ebm.MALA(m, step_size=0.3), 4, step_size=0.3)
    data = jax.random.normal(jax.random.key(5), (50, 3)) * jnp.array([1.0, 2.0, 0.5])

    @jax.jit
    def trace(at):
        args = data + at, at
        return kernel.sample(kernel.init(jax.random.key(6), 0, None, args, {}), args, {}).auxiliary

    here, there = trace(jnp.zeros(3)), trace(jnp.array([8.0, 0.0, -30.0]))
    assert np.all(np.abs(here.recoil) > 0.01)
    # Before the first step the fictitious data are the data, and the end is not half way.
    np.testing.assert_allclose(here.spread, here.distance, rtol=1e-6)
    assert abs(here.movement - here.distance) > 0.01
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4), here, there)


@short
def test_figures_of_a_trace_are_those_by_hand():
    """Half way and at the end log p̃ is independent noise; at the end it drifts with θ'."""
    rng, num = np.random.default_rng(3), 400
    theta = rng.normal(1.0, 2.0, (num, 2)) * [1.0, 10.0]
    noise, ratios = rng.normal(size=(2, num, 3)) * [[[9.0, 0.5, 0.5]], [[1.0, 0.7, 0.5]]]
    noise[:, 2] += 0.3 + 0.2 * theta[:, 0]
    ratios[:, 2] += 0.8
    moved, spread, recoil = rng.exponential(size=(3, num))
    fields: dict[str, Any] = {
        "proposal": theta,
        "log_density": noise,
        "log_ratio": ratios,
        "accept_prob": rng.random(num),
        "step_size": np.full(num, 0.7),
        "recoil": recoil,
        "movement": moved,
        "distance": spread / 1.3,
        "spread": spread,
    }
    trace = AuxiliaryTrace(**fields)
    with mock.patch.object(adequacy, "prior_widths", lambda *_: {"": np.full(2, 0.3)}):
        found = ebm.auxiliary_adequacy(
            Ran(None, None, jax.tree.map(lambda x: x[None], trace), None)
        )
    accepted = np.exp(np.minimum(ratios[:, :1] - ratios[:, 1:], 0.0))
    w = accepted.prod(1) / accepted.prod(1).mean()
    x, y = np.column_stack([np.ones(num), theta]), noise[:, 2] - noise[:, 1]
    bread = np.linalg.inv(x.T @ (w[:, None] * x))
    slope = bread @ x.T @ (w * y)
    left, leverage = y - x @ slope, w * np.sum((x @ bread) * x, 1)
    drift = np.sqrt(np.mean(w * (x @ slope) ** 2))
    np.testing.assert_allclose(found.drift, drift)
    np.testing.assert_allclose(found.sds, drift / np.sqrt(np.mean(w * left**2) / 2))
    assert found.sds == pytest.approx(np.sqrt((0.3 + 0.2) ** 2 + 0.4**2) / 0.5, rel=0.2)
    own = x * (w * left / (1 - leverage))[:, None]  # HC3
    wald = slope @ np.linalg.solve(bread @ own.T @ own @ bread, slope)
    np.testing.assert_allclose(found.statistic, wald, rtol=1e-6)
    for of_mean, of_error, values in (
        (found.ratio_drift, found.ratio_error, w * (ratios[:, 2] - ratios[:, 1])),
        (found.recoil, found.recoil_error, w * recoil),
    ):
        np.testing.assert_allclose(of_mean, values.mean())
        np.testing.assert_allclose(of_error, values.std(ddof=1) / np.sqrt(num))
    np.testing.assert_allclose(found.correlation, 0.3)
    np.testing.assert_allclose(found.movement, np.mean(2 * moved / (moved + spread)))
    np.testing.assert_allclose(
        [found.accept_prob, found.step_size], [trace.accept_prob.mean(), 0.7]
    )
    of_recoil = stats.chi2(1).sf((found.recoil / found.recoil_error) ** 2)
    least = min(of_recoil, stats.chi2(3).sf(wald))
    assert found.p_value == pytest.approx(4 * least, rel=1e-6, abs=0.0) and not found.is_adequate


def test_widths_are_those_of_every_element():
    """Of N(0, 1) and N(0, 3) beside N(0, 1) and N(0, 2): 1 and 1.5."""
    normal = np.random.default_rng(0).normal(size=(20_000, 2))
    ratio = _width(normal * [1.0, 3.0]) / _width(normal * [1.0, 2.0])
    np.testing.assert_allclose(ratio, [1.0, 1.5], rtol=1e-6)


def test_draws_are_compared_with_those_of_the_prior():
    """N(0, 0.5²) where the prior is N(0, 2²)."""
    mcmc: Any = Ran(None, (np.zeros(3), np.ones(3)), None, None)
    mcmc.get_samples = lambda: {"slope": 0.5 * stats.norm.ppf((np.arange(1_000) + 0.5) / 1_000)}
    found = prior_widths(mcmc, SimpleNamespace(model=regression))
    assert found == {"slope": pytest.approx(0.25, rel=0.15)}
