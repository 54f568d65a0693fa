# SPDX-License-Identifier: Apache-2.0
"""Discrete parameters that NumPyro enumerates, against the same density in plain NumPyro."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.funsor import config_enumerate, enum
from numpyro.contrib.funsor import log_density as enumerated_log_density
from numpyro.handlers import mask, scale, seed
from numpyro.infer import Predictive

import numpyro_ebm as ebm

WIDTHS = jnp.array([0.5, 1.0, 2.0])
SHIFTS = jnp.array([-1.0, 2.0])
PROBS = jnp.array([0.2, 0.5, 0.3])
X = jnp.array([0.3, -0.4, 0.1, 0.8, 0.0, -1.1])  # a covariate
KEEP = jnp.array([True, True, False, True, True, True])
WEIGHTS = jnp.array([1.0, 2.0, 0.0, 1.0, 0.5, 3.0])
DATA = jnp.array([1.2, 0.1, -0.3, 2.2, 0.9, 0.4])


def rows(v, p, mean, *, is_peer, dim=-1):
    """v ~ N(mean, 1/p), stated as an energy or as it is."""
    if is_peer:
        numpyro.sample("v", dist.Normal(mean, p**-0.5), obs=v)
        return
    v = numpyro.sample("v", ebm.Lebesgue(), obs=v)
    ebm.energy("E", 0.5 * p * (v - mean) ** 2)


def one(is_peer, dim=-1, size=None, around=None):
    def model(v):
        k = numpyro.sample("k", dist.Categorical(PROBS))
        b = numpyro.sample("b", dist.Normal(0.0, 1.0))
        v, x = (v, X) if dim == -1 else (v[:, None], X[:, None])
        with numpyro.plate("data", len(v), subsample_size=size, dim=dim) as i:
            batch = v if size is None else v[i]
            x = x if size is None else x[i]
            with mask(mask=True) if around is None else around():
                rows(batch, WIDTHS[k], b + x, is_peer=is_peer)

    return model


def two(is_peer):
    def model(v):
        k = numpyro.sample("k", dist.Categorical(PROBS))
        j = numpyro.sample("j", dist.Bernoulli(0.2 + 0.3 * k))
        b = numpyro.sample("b", dist.Normal(WIDTHS[k], 1.0))
        with numpyro.plate("data", len(v)):
            rows(v, WIDTHS[k], b + SHIFTS[j] + X, is_peer=is_peer)

    return model


def latent(is_peer):
    """A real latent site in the rows, which stays in the model."""

    def model(v):
        k = numpyro.sample("k", dist.Categorical(PROBS))
        b = numpyro.sample("b", dist.Normal(0.0, 1.0))
        with numpyro.plate("data", len(v)):
            z = numpyro.sample("z", dist.Normal(b + X, 2.0))
            rows(v, WIDTHS[k], z, is_peer=is_peer)

    return model


MODELS = {
    "one": one,
    "rows in dim -2": lambda is_peer: one(is_peer, dim=-2),
    "subsampled": lambda is_peer: one(is_peer, size=3),
    "weighted": lambda is_peer: one(is_peer, around=lambda: scale(scale=WEIGHTS + 0.5)),
    "masked": lambda is_peer: one(is_peer, around=lambda: mask(mask=KEEP)),
    "two": two,
    "latent": latent,
}


def density(model, params, data=DATA, max_plate_nesting=2):
    model = enum(config_enumerate(seed(model, 5)), -1 - max_plate_nesting)
    return jax.jit(lambda data, params: enumerated_log_density(model, (data,), {}, params)[0])(
        data, params
    )


@pytest.mark.parametrize("name", MODELS)
def test_values_are_summed_as_numpyro_sums_them(name):
    params = {"b": jnp.array(0.7), "z": jnp.linspace(-1.0, 1.0, len(DATA))}
    ours, peer = ebm.normalized(MODELS[name](False)), MODELS[name](True)

    def both(b):
        at = {**params, "b": b}
        return jnp.stack([density(ours, at), density(peer, at)])

    value, slope = jax.jit(lambda b: jax.jvp(both, (b,), (1.0,)))(params["b"])
    np.testing.assert_allclose(value[0], value[1], rtol=1e-5)
    np.testing.assert_allclose(slope[0], slope[1], rtol=1e-5)


@pytest.mark.parametrize("dim", [-1, -2])
def test_losses_at_enumerated_values(dim):
    """½ (p (v - b - x))² - p of every row, by hand."""

    def peer(v):
        k = numpyro.sample("k", dist.Categorical(PROBS))
        b = numpyro.sample("b", dist.Normal(0.0, 1.0))
        loss = 0.5 * (WIDTHS[k] * (v - b - X)) ** 2 - WIDTHS[k]
        with numpyro.plate("data", len(v)):
            numpyro.factor("loss", -0.6 * loss)

    ours = ebm.generalized(one(False, dim=dim), ebm.ScoreMatching(), 0.6)
    params = {"b": jnp.array(0.7)}
    np.testing.assert_allclose(density(ours, params), density(peer, params), rtol=1e-5)


def test_an_emulated_normalizer_at_enumerated_values():
    """A function of the parameters with an error of its own, at each of the values."""

    def log_z(params):
        return 0.5 * jnp.log(2 * jnp.pi / WIDTHS[params["k"]])

    def peer(v):
        k = numpyro.sample("k", dist.Categorical(PROBS))
        b = numpyro.sample("b", dist.Normal(0.0, 1.0))
        numpyro.factor("doubt", -0.5 * (len(v) * 0.1 * WIDTHS[k]) ** 2)
        with numpyro.plate("data", len(v)):
            rows(v, WIDTHS[k], b, is_peer=True)

    def flat(v):
        k = numpyro.sample("k", dist.Categorical(PROBS))
        b = numpyro.sample("b", dist.Normal(0.0, 1.0))
        with numpyro.plate("data", len(v)):
            rows(v, WIDTHS[k], b, is_peer=False)

    class WithError:
        def __call__(self, params):
            return log_z(params)

        def mcse(self, params):
            return 0.1 * WIDTHS[params["k"]]

    params = {"b": jnp.array(0.7)}
    ours = ebm.normalized(flat, WithError())
    np.testing.assert_allclose(density(ours, params), density(peer, params), rtol=1e-5)


@pytest.mark.slow
def test_discrete_values_are_drawn_from_their_posterior():
    draws = Predictive(
        ebm.normalized(one(False)), {"b": jnp.full(2_000, 0.7)}, infer_discrete=True
    )(jax.random.key(3), DATA)["k"]
    log_joint = jnp.log(PROBS) + jnp.sum(
        dist.Normal(0.7 + X[:, None], WIDTHS**-0.5).log_prob(DATA[:, None]), 0
    )
    expected = np.asarray(jax.nn.softmax(log_joint))
    found = np.bincount(np.asarray(draws), minlength=3) / draws.size
    assert np.all(np.abs(found - expected) < 4 * np.sqrt(expected * (1 - expected) / draws.size))


@pytest.mark.parametrize("route", ["normalized", "generalized"])
def test_enumerated_parameters_in_a_plate_are_refused(route):
    def model(v):
        with numpyro.plate("groups", 2):
            k = numpyro.sample("k", dist.Categorical(PROBS))
        b = numpyro.sample("b", dist.Normal(0.0, 1.0))
        with numpyro.plate("data", len(v)):
            rows(v, WIDTHS[k[0]], b, is_peer=False)

    ours = ebm.normalized(model) if route == "normalized" else None
    ours = ebm.generalized(model, ebm.ScoreMatching()) if ours is None else ours
    with pytest.raises(ebm.ModelError, match="'k', which is in a plate"):
        density(ours, {"b": jnp.array(0.7)})


def test_too_few_axes_are_refused():
    with pytest.raises((ebm.ModelError, ValueError)):
        density(ebm.normalized(one(False)), {"b": jnp.array(0.7)}, max_plate_nesting=0)
