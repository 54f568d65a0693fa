# SPDX-License-Identifier: Apache-2.0
"""What the tests of posteriors share."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import scipy.stats
from numpyro.handlers import seed, substitute, trace
from numpyro.infer.util import log_density

import numpyro_ebm as ebm

KEY = jax.random.key(0)
ROWS = np.random.default_rng(0).standard_normal(200)


def precision_model(data, prior=None):
    """Rows N(0, 1/precision) by their energy."""
    prior = dist.Gamma(2.0, 1.0) if prior is None else prior
    precision = numpyro.sample("precision", prior)
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", 0.5 * precision * v**2)


def ring_model(data):
    """Four spins on a ring, of unknown coupling and field."""
    beta = numpyro.sample("beta", dist.Normal(0.0, 1.0))
    field = numpyro.sample("field", dist.Normal(0.0, 1.0))
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Counting(2, event_shape=(4,)), obs=data)
        s = 2.0 * v - 1.0
        ebm.energy("E", -beta * jnp.sum(s * jnp.roll(s, 1, -1), -1) - field * jnp.sum(s, -1))


SPINS = np.random.default_rng(1).integers(0, 2, (30, 4))
STATES = np.array(list(itertools.product([0, 1], repeat=4)))


def ring_log_likelihood(beta, field, data):
    def energy(v):
        s = 2.0 * v - 1.0
        return -beta * np.sum(s * np.roll(s, 1, -1), -1) - field * np.sum(s, -1)

    return -energy(data) - scipy.special.logsumexp(-energy(STATES))


def hidden_model(data):
    """Real rows with two binary hidden units, and priors on the weights."""
    W = numpyro.sample("W", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        h = numpyro.sample("h", ebm.Counting(2, event_shape=(2,)))
        ebm.energy("E", 0.5 * v**2 - v * (h @ W) + h[..., 0] * h[..., 1])


def density(model, params, *args, rng_key=KEY):
    """Log joint density of a model at given parameters."""
    return log_density(seed(model, rng_key), args, {}, params)[0]


def rows_of(model, params, *args):
    """Log-likelihoods by site."""
    model_trace = trace(substitute(seed(model, KEY), data=params)).get_trace(*args)
    return {
        name: site["fn"].log_prob(site["value"])
        for name, site in model_trace.items()
        if site["type"] == "sample" and site["is_observed"]
    }


def slope(f, x, step):
    return (f(x + step) - f(x - step)) / (2 * step)


def lattice_model(data):
    beta = numpyro.sample("beta", dist.Normal(0.0, 1.0))
    field = numpyro.sample("field", dist.Normal(0.0, 1.0))
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Counting(2, event_shape=(3, 3)), obs=data)
        s = 2.0 * v - 1.0
        bonds = jnp.sum(s[:, 1:] * s[:, :-1], (1, 2)) + jnp.sum(s[..., 1:] * s[..., :-1], (1, 2))
        ebm.energy("E", -beta * bonds - field * jnp.sum(s, (1, 2)))
