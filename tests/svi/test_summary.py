# SPDX-License-Identifier: Apache-2.0
"""What a fit prints: its verdict on losses of a known course, and the numbers that it has."""

import pickle
import re

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import optax
import pytest
from numpyro.infer.svi import SVIRunResult

import numpyro_ebm as ebm
from numpyro_ebm.svi.state import EnergySVIRunResult
from numpyro_ebm.svi.summary import gradient_norm, lines_of, verdict

STEPS = np.arange(2_000)
NOISE = np.random.default_rng(0).normal(size=2_000)


@pytest.mark.parametrize(
    ("losses", "words"),
    [
        (NOISE, "is level"),
        (np.ones(500), "is level"),
        (0.1 * NOISE - STEPS / 1_000, "still falls, by 0.(49|5|51) in the last 500"),
        (0.1 * NOISE + STEPS / 1_000, "rises, by 0.(49|5|51) in the last 500"),
        (np.exp(-STEPS / 50) + 0.01 * NOISE, "is level"),  # it fell, long ago
        (np.where(STEPS % 7 == 0, np.nan, NOISE)[1:], "is level"),  # rounds that were undone
        (NOISE[:79], "too few steps"),
        (np.append(NOISE, np.nan), "not finite"),
        (np.zeros(0), "stopped"),
    ],
)
def test_the_verdict_on_losses(losses, words):
    assert re.search(words, verdict(losses))


def gaussian(data):
    mean = numpyro.param("mean", jnp.zeros(2))
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue((2,)), obs=data)
        ebm.energy("E", 0.5 * jnp.sum((v - mean) ** 2, -1))


def test_a_fit_prints_well_and_stays_a_named_tuple():
    data = jnp.array([[1.0, 2.0], [3.0, 2.0]])
    svi = ebm.EnergySVI(gaussian, None, optax.adam(0.1), ebm.ScoreMatching())
    fit = svi.run(jax.random.key(0), 1, data, progress_bar=False)
    text = repr(fit)
    for words in ("ScoreMatching", "steps      1\n", "too few steps", "mean (2,)"):
        assert words in text
    # after one step Adam's mean is a tenth of the gradient, (0 - 2, 0 - 2)
    np.testing.assert_allclose(gradient_norm(fit.state), 0.1 * np.sqrt(8), rtol=1e-5)
    assert fit._repr_html_().count("<tr>") == text.count("\n")
    params, _, losses = fit
    assert isinstance(fit, SVIRunResult) and params is fit.params and losses is fit.losses
    again = jax.tree.map(lambda x: x, fit)
    assert type(again) is EnergySVIRunResult
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(fit)).losses, fit.losses)


def test_names_of_a_fit_are_escaped_in_html():
    fit = EnergySVIRunResult({"<b>": jnp.zeros(3)}, None, jnp.ones(2))
    assert "&lt;b&gt; (3,)" in fit._repr_html_() and "unknown" in repr(fit)


def test_the_loss_that_is_printed_is_the_mean_of_the_last_quarter():
    """Of what is finite there."""
    losses = np.append(np.arange(99.0), 400.0)
    losses[80] = np.nan
    fit = EnergySVIRunResult({}, None, losses)
    expected = np.nanmean(losses[75:])
    assert dict(lines_of(fit))["loss"] == f"{expected:.5g} (mean of the last 24)"
