# SPDX-License-Identifier: Apache-2.0
"""What the tests of svi share."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from scipy import stats
from scipy.optimize import minimize_scalar

import numpyro_ebm as ebm

DATA = 0.5 * jax.random.normal(jax.random.key(0), (40,))
N, M1, M2 = 40, float(jnp.mean(DATA)), float(jnp.mean(DATA**2))
KEY = jax.random.key(1)
PRIOR = dist.LogNormal(0.5, 0.4)


def gaussian(data, prior=PRIOR):
    precision = numpyro.sample("precision", prior)
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", 0.5 * precision * v**2)


def line(data):
    """The score θ₂ − θ₁ v is linear in θ, and so score matching is quadratic in it."""
    theta = numpyro.sample("theta", dist.Normal(jnp.array([1.0, -1.0]), 0.7).to_event(1))
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", 0.5 * theta[0] * v**2 - theta[1] * v)


def penalised_score_matching(precision, m2=M2):
    prior = stats.lognorm.logpdf(precision, 0.4, scale=np.exp(0.5))
    return 0.5 * precision**2 * m2 - precision - prior / N


BEST = minimize_scalar(penalised_score_matching, bounds=(0.1, 20.0), method="bounded").x


def adam(rate=0.05, steps=300, factor=0.1):
    return optax.adam(optax.exponential_decay(rate, steps, factor))


def train(model, guide=None, loss=None, num_steps=800, optim=None, data=DATA, **options):
    optim = adam() if optim is None else optim
    svi = ebm.EnergySVI(model, guide, optim, ebm.ScoreMatching() if loss is None else loss)
    return svi, svi.run(KEY, num_steps, data, progress_bar=False, **options)


def by_hand(data):
    loc = numpyro.param("loc", jnp.zeros(2))
    scale = numpyro.param("scale", jnp.ones(2), constraint=dist.constraints.positive)
    numpyro.sample("theta", dist.Normal(loc, scale).to_event(1))


def grbm(data):
    W = numpyro.sample("W", dist.Normal(0.0, 1.0).expand([2, 3]).to_event(2))
    c = numpyro.sample("c", dist.Normal(0.0, 0.5).expand([3]).to_event(1))
    b = numpyro.param("b", jnp.zeros(2))
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(event_shape=(2,)), obs=data)
        h = numpyro.sample("h", ebm.Counting(event_shape=(3,)))
        bowl = 0.5 * jnp.sum((v - b) ** 2, -1)
        ebm.energy("E", bowl - h @ c - jnp.sum((v @ W) * h, -1))


ROWS = ebm.datasets.checkerboard(jax.random.key(7), 200)


def dsm_vages():
    return ebm.DenoisingScoreMatching(0.3, marginal=ebm.VaGES())
