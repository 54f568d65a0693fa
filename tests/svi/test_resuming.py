# SPDX-License-Identifier: Apache-2.0
"""Rounds that are undone, numbers that overflow, and states that belong to another run."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import optax
import pytest

import numpyro_ebm as ebm

DATA = np.random.default_rng(2).normal(1.0, 1.0, 60)


NOISE = numpyro.distributions.Normal(1.0, 1.0)


def gaussian(data):
    mean = numpyro.param("mean", 0.0)
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", 0.5 * (v - mean) ** 2)


def wide(data):
    """Finite unless a batch holds a row above 2: then its gradient is infinite."""
    mean = numpyro.param("mean", 0.0)
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        steep = jnp.where(v > 2.0, 1e30, 1.0)
        ebm.energy("E", 0.5 * (v - mean * steep * steep) ** 2)


def run(svi, num_steps, **options):
    return svi.run(jax.random.key(3), num_steps, DATA, progress_bar=False, **options)


def test_a_round_that_was_undone_is_not_tried_again():
    """Ten rows a batch, nine rows that break it: good batches come again after bad ones."""
    svi = ebm.EnergySVI(wide, None, optax.sgd(0.01), ebm.ScoreMatching())
    options = {"batch_size": 10, "stable_update": True}
    with pytest.warns(ebm.NonFiniteLossWarning, match="rounds were undone"):
        whole = run(svi, 60, **options)
    order = np.flatnonzero(np.isfinite(whole.losses))
    assert 5 < len(order) < 55 and order[-1] > 40
    # Chunks of other lengths, a resumed run among them, see the same rounds.
    with pytest.warns(ebm.NonFiniteLossWarning):
        first = run(svi, 23, **options)
    with pytest.warns(ebm.NonFiniteLossWarning):
        second = run(svi, 37, init_state=first.state, **options)
    assert np.array_equal(
        np.concatenate([first.losses, second.losses]), whole.losses, equal_nan=True
    )
    assert whole.params["mean"] == second.params["mean"] and int(whole.state.step) == 60


def test_stable_updates_of_the_users_own_loop_go_on():
    svi = ebm.EnergySVI(wide, None, optax.sgd(0.01), ebm.DenoisingScoreMatching(0.3))
    state = svi.init(jax.random.key(0), DATA[DATA < 1.5])
    bad, loss = svi.stable_update(state, DATA)
    assert np.isnan(loss) and bad.step == 1
    assert jnp.array_equal(svi.get_params(bad)["mean"], svi.get_params(state)["mean"])
    assert not jnp.array_equal(bad.step_key, state.step_key)


@pytest.mark.parametrize("watched", [False, True])
def test_an_optimiser_that_overflows_stops_the_run(watched):
    """The square of a gradient of 1e25 is infinite, and Adam would stand still from there on."""

    def steep(data):
        mean = numpyro.param("mean", 0.0)
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            ebm.energy("E", v**2 + v * 1e25 * mean)

    svi = ebm.EnergySVI(steep, None, optax.adam(1e-3), ebm.ScoreMatching())
    words = "20 of 20 rounds were undone" if watched else "step 1 of 20.*numbers of an optimiser"
    with pytest.warns(ebm.NonFiniteLossWarning, match=words):
        run(svi, 20, stable_update=watched)


def test_an_optimiser_may_start_at_infinity():
    """As one that keeps the least loss so far, or a bound, may."""
    bound = optax.GradientTransformation(
        lambda params: jnp.inf, lambda g, bound, p=None: (g, bound)
    )
    optim = optax.chain(bound, optax.sgd(0.1))
    fit = run(ebm.EnergySVI(gaussian, None, optim, ebm.ScoreMatching()), 150)
    assert len(fit.losses) == 150 and abs(fit.params["mean"] - DATA.mean()) < 1e-3


def test_numbers_of_keys_that_are_not_counter_based_are_those_of_one_long_run():
    svi = ebm.EnergySVI(gaussian, None, optax.adam(0.1), ebm.DenoisingScoreMatching(0.3))
    key = jax.random.key(5, impl="rbg")
    whole = svi.run(key, 30, DATA, progress_bar=False)
    first = svi.run(key, 10, DATA, progress_bar=False)
    second = svi.run(key, 20, DATA, init_state=first.state, progress_bar=False)
    assert jnp.array_equal(whole.losses, jnp.concatenate([first.losses, second.losses]))


def two_parameters(data):
    scale = numpyro.param("scale", 1.0, constraint=numpyro.distributions.constraints.positive)
    mean = numpyro.param("mean", 0.0)
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", 0.5 * ((v - mean) / scale) ** 2)


def chains(num_steps=1):
    kernel = lambda model: ebm.MALA(model, step_size=0.5)  # noqa: E731
    return ebm.ContrastiveDivergence(kernel, num_steps, persistent=True)


@pytest.mark.parametrize(
    "model, optim, objective, message",
    [
        (
            gaussian,
            optax.sgd(0.1),
            ebm.ScoreMatching(),
            r"optim_state.*mu.*is float32\[\] and shou",
        ),
        (two_parameters, optax.adam(0.1), ebm.ScoreMatching(), r"optim_state.*'scale'.*is absent"),
        (gaussian, optax.adam(0.1), chains(), "objective_state.*Contrastive.*absent and should be"),
        (
            gaussian,
            optax.adam(0.1),
            ebm.NCE(numpyro.distributions.Normal(1.0, 1.0)),
            "optim_state.*absent and should be float32",
        ),
    ],
)
def test_a_state_of_another_run_is_refused(model, optim, objective, message):
    state = run(ebm.EnergySVI(gaussian, None, optax.adam(0.1), ebm.ScoreMatching()), 2).state
    svi = ebm.EnergySVI(model, None, optim, objective)
    with pytest.raises(ebm.ModelError, match=message):
        run(svi, 2, init_state=state)
    run(svi, 1)  # its model read, the same is said
    with pytest.raises(ebm.ModelError, match=message):
        run(svi, 2, init_state=state)


def test_what_is_no_state_is_refused():
    svi = ebm.EnergySVI(gaussian, None, optax.adam(0.1), ebm.ScoreMatching())
    fit = run(svi, 2)
    with pytest.raises(ebm.ModelError, match="this is the whole result"):
        run(svi, 2, init_state=fit)
    with pytest.raises(ebm.ModelError, match="got a dict"):
        run(svi, 2, init_state=fit.params)
    kept = fit.state._replace(objective_state=(jnp.zeros(3),))
    with pytest.raises(ebm.ModelError, match="objective_state.*should be absent"):
        run(svi, 2, init_state=kept)
