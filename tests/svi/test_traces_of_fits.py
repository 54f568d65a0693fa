# SPDX-License-Identifier: Apache-2.0
"""How often a fit traces the user's model, and what is checked of it where it is not traced."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.infer.autoguide import AutoNormal

import numpyro_ebm as ebm
from numpyro_ebm.models import grbm, grbm_guide

KEY = jax.random.key(0)
DATA = jax.random.normal(jax.random.key(1), (60, 2))
ADAM = optax.adam(1e-3)
SIZES = {"num_visible": 2, "num_hidden": 3}


def counted(fn):
    def model(*args, **kwargs):
        model.count += 1
        return fn(*args, **kwargs)

    model.count = 0
    return model


def gaussian(data, scale=1.0):
    precision = numpyro.param("precision", 1.0, constraint=dist.constraints.positive)
    with numpyro.plate("rows", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue((2,)), obs=data)
        ebm.energy("E", 0.5 * precision * jnp.sum((v / scale) ** 2, -1))


def bayesian(data):
    precision = numpyro.sample("precision", dist.Gamma(2.0, 1.0))
    with numpyro.plate("rows", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue((2,)), obs=data)
        ebm.energy("E", 0.5 * precision * jnp.sum(v**2, -1))


def bayesian_grbm(data, **sizes):
    W = numpyro.sample("W", dist.Normal(0, 1).expand([2, 3]).to_event(2))
    with numpyro.plate("rows", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue((2,)), obs=data)
        h = numpyro.sample("h", ebm.Counting(2, (3,)))
        ebm.energy("E", 0.5 * jnp.sum(v**2, -1) - jnp.sum((v @ W) * h, -1))


def vages(guide_loss=None):
    return partial(
        ebm.EnergySVI,
        optim=ADAM,
        loss=ebm.DenoisingScoreMatching(0.1, ebm.VaGES(2)),
        guide_loss=guide_loss,
        num_guide_steps=3,
        **SIZES,
    )


def plain(loss):
    return partial(ebm.EnergySVI, guide=None, optim=ADAM, loss=loss)


def of_prior(model):
    return ebm.EnergySVI(model, AutoNormal(ebm.prior(model)), ADAM, ebm.ScoreMatching())


FITS = {
    "all rows": (gaussian, plain(ebm.ScoreMatching()), None),
    "minibatches": (gaussian, plain(ebm.DenoisingScoreMatching(0.1)), 20),
    "noise contrast": (gaussian, plain(ebm.NCE(dist.Normal(0, 2).expand([2]).to_event(1))), 20),
    "a guide": (grbm, partial(vages(), guide=grbm_guide), 20),
    "a guide and an ELBO": (
        grbm,
        partial(vages(numpyro.infer.TraceGraph_ELBO()), guide=grbm_guide),
        20,
    ),
    "exact sums": (grbm, partial(plain(ebm.ScoreMatching()), **SIZES), 20),
    "a prior": (bayesian, plain(ebm.ScoreMatching()), 20),
    "a prior and a guide": (bayesian_grbm, partial(vages(), guide=grbm_guide), 20),
    "a posterior": (bayesian, of_prior, 20),
}


@pytest.mark.parametrize("name", FITS)
def test_a_fit_traces_its_model_five_times_at_most(name):
    fn, make, batch_size = FITS[name]
    model = counted(fn)
    svi = make(model)
    fit = svi.run(KEY, 5, DATA, batch_size=batch_size, progress_bar=False)
    assert 0 < model.count <= 5
    before = model.count
    svi.run(KEY, 5, DATA, batch_size=batch_size, progress_bar=False, init_state=fit.state)
    assert model.count == before  # nothing new to find out


@pytest.mark.slow
def test_an_update_on_another_batch_is_not_traced_again():
    """Eager updates repeat the operations of the first one at each batch's own values."""
    model = counted(gaussian)
    svi = ebm.EnergySVI(model, None, ADAM, ebm.ScoreMatching())
    state = svi.init(KEY, DATA[:20])
    state, _ = svi.update(state, DATA[20:40])
    before = model.count
    losses = [float(svi.evaluate(state, DATA[i : i + 20])) for i in (0, 20, 40)]
    assert model.count == before
    expected = [  # Hyvärinen's loss of N(0, I / p): p² |v|² / 2 - 2 p, a mean over rows
        float(jnp.mean(0.5 * p**2 * jnp.sum(DATA[i : i + 20] ** 2, -1) - 2 * p))
        for p in [svi.get_params(state)["precision"]]
        for i in (0, 20, 40)
    ]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


def test_data_of_a_later_run_are_checked():
    svi = ebm.EnergySVI(gaussian, None, ADAM, ebm.ScoreMatching())
    fit = svi.run(KEY, 5, DATA, progress_bar=False)
    bad = DATA.at[3, 1].set(jnp.nan)
    with pytest.raises(ebm.ModelError, match="contain NaN"):
        svi.run(KEY, 5, bad, progress_bar=False, init_state=fit.state)


def test_data_that_the_model_transforms_are_checked():
    def model(data):
        return gaussian(jnp.log(data))

    svi = ebm.EnergySVI(model, None, ADAM, ebm.ScoreMatching())
    with pytest.raises(ebm.ModelError, match="contain NaN"):
        svi.run(KEY, 5, jnp.linspace(-1.0, 1.0, 40).reshape(20, 2), progress_bar=False)


@pytest.mark.slow
def test_an_argument_that_makes_another_model_is_seen():
    """What is no array may change the model: it is then checked as at the start."""

    def model(data, couple):
        with numpyro.plate("rows", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue((2,)), obs=data)
            mean = jnp.mean(v, 0) if couple else 0.0
            ebm.energy("E", jnp.sum((v - mean) ** 2, -1) * numpyro.param("p", 1.0))

    svi = ebm.EnergySVI(model, None, ADAM, ebm.ScoreMatching())
    state = svi.init(KEY, DATA, False)
    svi.update(state, DATA, False)
    with pytest.raises(ebm.ModelError, match="depends on other rows"):
        svi.update(state, DATA, True)


def test_a_number_among_the_arguments_is_not_a_constant():
    svi = ebm.EnergySVI(gaussian, None, ADAM, ebm.ScoreMatching())
    state = svi.init(KEY, DATA, 1.0)
    wide, narrow = (float(svi.evaluate(state, DATA, scale)) for scale in (2.0, 0.5))
    squares = float(jnp.mean(jnp.sum(DATA**2, -1)))
    np.testing.assert_allclose(wide, 0.5 * squares / 2**4 - 2 / 2**2, rtol=1e-5)
    np.testing.assert_allclose(narrow, 0.5 * squares * 2**4 - 2 * 2**2, rtol=1e-5)
