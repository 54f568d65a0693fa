# SPDX-License-Identifier: Apache-2.0
"""What the tables of mistakes share: small models without a fault, and calls that stop at one."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import optax
from numpyro.infer import MCMC, init_to_value

import numpyro_ebm as ebm

KEY = jax.random.key(0)
ROWS = 6
X = jax.random.normal(jax.random.key(1), (ROWS, 2))
LINE = X[:, 0]
BITS = (X > 0).astype(int)


class Mistake(NamedTuple):
    """A call that cannot be meant, and what its message must say, a regular expression."""

    call: Callable[[], Any]
    says: str
    error: type[Exception] = ebm.ModelError


def plate(data, name="data"):
    return numpyro.plate(name, 1 if data is None else len(data))


def plane(data=None, n=2):
    """A Gaussian energy of two coordinates, with a parameter W."""
    W = numpyro.param("W", jnp.eye(n))
    with plate(data):
        v = numpyro.sample("v", ebm.Lebesgue((n,)), obs=data)
        ebm.energy("E", 0.5 * jnp.sum((v @ W) ** 2, -1))


def line(data=None):
    """One of a real number, with a parameter m."""
    m = numpyro.param("m", 0.0)
    with plate(data):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", 0.5 * (v - m) ** 2)


def ising(data=None, num_values=2):
    """Two bits with a field b."""
    b = numpyro.param("b", jnp.zeros(2))
    with plate(data):
        v = numpyro.sample("v", ebm.Counting(num_values, (2,)), obs=data)
        ebm.energy("E", -jnp.sum(v * b, -1))


def positive(data=None):
    a = numpyro.param("a", 1.0)
    with plate(data):
        v = numpyro.sample("v", ebm.Lebesgue((), dist.constraints.positive), obs=data)
        ebm.energy("E", a * v)


def rbm(data=None):
    """Two real sites and three hidden bits."""
    W = numpyro.param("W", 0.1 * jnp.ones((2, 3)))
    with plate(data):
        v = numpyro.sample("v", ebm.Lebesgue((2,)), obs=data)
        h = numpyro.sample("h", ebm.Counting(2, (3,)))
        ebm.energy("E", 0.5 * jnp.sum(v**2, -1) - jnp.sum((v @ W) * h, -1))


def guide(data=None):
    A = numpyro.param("A", jnp.zeros((2, 3)))
    with plate(data):
        v = ebm.visible("v", data)
        numpyro.sample("h", dist.Bernoulli(logits=v @ A).to_event(1))


def bayesian(data=None):
    theta = numpyro.sample("theta", dist.Gamma(2.0, 1.0))
    with plate(data):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", 0.5 * theta * v**2)


FIXED = ebm.fixed(plane, {"W": jnp.eye(2)})
FIXED_BITS = ebm.fixed(ising, {"b": jnp.zeros(2)})


def svi(model=plane, q=None, *, loss=None, optim=None, **options):
    optim = optax.adam(0.01) if optim is None else optim
    return ebm.EnergySVI(model, q, optim, ebm.ScoreMatching() if loss is None else loss, **options)


def fit(model=plane, q=None, data=X, *, loss=None, num_steps=1, **options):
    """A fit of one step, which no mistake reaches."""
    return svi(model, q, loss=loss).run(KEY, num_steps, data, progress_bar=False, **options)


def noisy():
    return ebm.DenoisingScoreMatching(0.1, marginal=ebm.VaGES(2))


def chain(kernel, *args, num=1, **options):
    mcmc = MCMC(kernel, num_warmup=1, num_samples=num, progress_bar=False)
    mcmc.run(KEY, *args, **options)
    return mcmc


def model_of(base, energy, *, obs=True):
    """A model with one site, of a base measure, and an energy of its value."""

    def model(data=None):
        W = numpyro.param("W", jnp.eye(2))
        with plate(data):
            v = numpyro.sample("v", base(), obs=data if obs else None)
            ebm.energy("E", energy(v, W))

    return model


def run(*args, **options):
    return svi().run(*args, progress_bar=False, **options)


def quartic(data=None):
    theta = numpyro.sample("theta", dist.Gamma(2.0, 1.0))
    with plate(data):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", theta * v**4)


def started(kernel, model, **values):
    """A kernel that starts at values."""
    return kernel(model, init_strategy=init_to_value(values=values))


PARAMS = {"W": jnp.eye(2)}
ARGUMENTS = r"`rng_key` must be a random key.*Its arguments are \['rng_key', 'model'"
