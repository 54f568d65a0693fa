# SPDX-License-Identifier: Apache-2.0
"""Runs that stop loudly, input that is refused, and the checkerboard."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.infer import Trace_ELBO, TraceGraph_ELBO
from svi_cases import DATA, assert_same, gaussian, vages_dsm

import numpyro_ebm as ebm
from numpyro_ebm.models import grbm, grbm_guide, grbm_log_likelihood
from numpyro_ebm.svi.state import EnergySVIState, is_finite, is_finite_on_host


def explosive(data):
    """An energy whose loss stops being finite once its parameter has grown."""
    slope = numpyro.param("slope", 1.0)
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", 0.5 * jnp.where(slope > 3.0, jnp.nan, 1.0) * v**2 - slope * v)


@pytest.mark.parametrize("batch_size, backend", [(None, "cpu"), (20, "gpu")])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_what_was_trained(
    batch_size, backend, monkeypatch
):
    """NumPy looks at the states on a CPU, and elsewhere the rounds' own program."""
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    svi = ebm.EnergySVI(explosive, None, optax.sgd(0.01), ebm.ScoreMatching())
    data = 10.0 + jnp.zeros(40)
    run = lambda: svi.run(  # noqa: E731
        jax.random.key(0), 500, data, batch_size=batch_size, progress_bar=False
    )
    with pytest.warns(ebm.NonFiniteLossWarning, match=r"step (\d+) of 500.*last finite state"):
        fit = run()
    assert np.isfinite(fit.params["slope"]) and fit.params["slope"] > 1.0
    done = int(fit.state.optim_state[0])
    assert 10 < done < 100 and len(fit.losses) == done + 1
    assert np.all(np.isfinite(fit.losses[:-1])) and not np.isfinite(fit.losses[-1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ebm.NonFiniteLossWarning) as caught:
            run()
    assert_same(caught.value.result.state, fit.state)
    # The last finite state can be used again.
    with pytest.warns(ebm.NonFiniteLossWarning, match="step 1 of 3"):
        svi.run(
            jax.random.key(0),
            3,
            data,
            batch_size=batch_size,
            init_state=fit.state,
            progress_bar=False,
        )


def test_a_gradient_that_is_not_finite_stops_the_run():
    def kinked(data):
        slope = numpyro.param("slope", 1.0)
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            ebm.energy("E", 0.5 * v**2 + jnp.sqrt(slope - 1.0) * v)

    svi = ebm.EnergySVI(kinked, None, optax.sgd(0.1), ebm.ScoreMatching())
    with pytest.warns(ebm.NonFiniteLossWarning, match="step 1 of 10"):
        fit = svi.run(jax.random.key(0), 10, jnp.ones(4), progress_bar=False)
    assert fit.params["slope"] == 1.0 and np.isfinite(fit.losses[0])
    with pytest.warns(ebm.NonFiniteLossWarning, match="10 of 10 rounds were undone"):
        fit = svi.run(jax.random.key(0), 10, jnp.ones(4), stable_update=True, progress_bar=False)
    assert np.all(np.isnan(fit.losses)) and fit.params["slope"] == 1.0


@pytest.mark.parametrize(
    "value, before, loss, expected",
    [
        (1.0, 0.0, 0.0, True),
        (jnp.nan, 0.0, 0.0, False),
        (jnp.inf, 0.0, 0.0, False),
        (1.0, 0.0, jnp.nan, False),
        (jnp.inf, jnp.inf, 0.0, True),
        (1.0, jnp.inf, -jnp.inf, False),
    ],
)
def test_a_look_on_the_host_finds_what_a_program_finds(value, before, loss, expected):
    def state(x):
        few = jnp.ones(3, jnp.bfloat16).at[1].set(x)
        return EnergySVIState((jnp.array(0), few), None, jax.random.key(0), jnp.array(1))

    losses = jnp.zeros(2).at[0].set(loss)
    assert bool(is_finite(state(value), losses, state(before))) is expected
    assert is_finite_on_host(state(value), losses, state(before)) is expected


def test_stable_update_keeps_the_state_and_goes_on():
    svi = ebm.EnergySVI(explosive, None, optax.sgd(0.01), ebm.ScoreMatching())
    with pytest.warns(ebm.NonFiniteLossWarning, match=r"\d+ of 100 rounds were undone"):
        fit = svi.run(
            jax.random.key(0), 100, 10.0 + jnp.zeros(40), stable_update=True, progress_bar=False
        )
    assert len(fit.losses) == 100 and np.isnan(fit.losses[-1])
    assert np.isfinite(fit.params["slope"])


def guide_of_categorical(data):
    logits = numpyro.param("logits", jnp.zeros(3))
    with numpyro.plate("data", len(data)):
        v = ebm.visible("v", data)
        numpyro.sample("h", dist.Categorical(logits=logits * v[:, None]))


def three_states(data):
    slope = numpyro.param("slope", 0.5)
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        h = numpyro.sample("h", ebm.Counting(num_values=3))
        ebm.energy("E", 0.5 * (v - slope * h) ** 2)


@pytest.mark.slow
def test_other_discrete_latents_default_to_the_score_function():
    objective = ebm.DenoisingScoreMatching(0.1, marginal=ebm.VaGES())
    data = jnp.linspace(-1, 2, 50)
    svi = ebm.EnergySVI(three_states, guide_of_categorical, optax.adam(1e-2), objective)
    assert svi.run(jax.random.key(0), 20, data, progress_bar=False).losses.shape == (20,)
    for guide_loss in (ebm.RelaxedELBO(), Trace_ELBO(), ebm.PosteriorScore()):
        svi = ebm.EnergySVI(
            three_states, guide_of_categorical, optax.adam(1e-2), objective, guide_loss=guide_loss
        )
        with pytest.raises(ebm.ModelError, match="TraceGraph_ELBO"):
            svi.run(jax.random.key(0), 2, data, progress_bar=False)
    svi = ebm.EnergySVI(
        three_states,
        guide_of_categorical,
        optax.adam(1e-2),
        objective,
        guide_loss=TraceGraph_ELBO(),
    )
    svi.run(jax.random.key(0), 2, data, progress_bar=False)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: vages_dsm(num_guide_steps=0), "num_guide_steps"),
        (lambda: ebm.EnergySVI(gaussian, None, optax.sgd(1.0), Trace_ELBO()), "guide_loss"),
        (
            lambda: ebm.EnergySVI(
                grbm, None, optax.sgd(1.0), ebm.ScoreMatching(marginal=ebm.VaGES(3))
            ).init(jax.random.key(0), DATA),
            "needs a guide",
        ),
        (
            lambda: vages_dsm().run(jax.random.key(0), 3, DATA, batch_size=0, progress_bar=False),
            "batch_size",
        ),
        (
            lambda: vages_dsm().run(
                jax.random.key(0), 3, DATA, batch_size=1_001, progress_bar=False
            ),
            "1000 rows",
        ),
        (
            lambda: vages_dsm().run(
                jax.random.key(0), 3, DATA.at[3, 1].set(jnp.nan), progress_bar=False
            ),
            "NaN",
        ),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ebm.ModelError, match=message):
        make()


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_checkerboard_reaches_the_optimum(seed):
    """The paper's settings: exact test log-likelihood at least 0.315 after 100,000 steps."""
    train = ebm.datasets.checkerboard(jax.random.key(10 + seed), 50_000)
    test = ebm.datasets.checkerboard(jax.random.key(20 + seed), 10_000)
    adam = optax.adam(1e-3, b1=0.9, b2=0.95)
    svi = ebm.EnergySVI(
        grbm,
        grbm_guide,
        adam,
        ebm.DenoisingScoreMatching(0.05, marginal=ebm.VaGES(num_particles=2)),
        guide_optim=adam,
        num_guide_steps=5,
    )
    fit = svi.run(jax.random.key(seed), 100_000, train, batch_size=100, progress_bar=False)
    assert grbm_log_likelihood(fit.params, test).mean() >= 0.315
