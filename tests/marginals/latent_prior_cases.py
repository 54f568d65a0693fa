# SPDX-License-Identifier: Apache-2.0
"""A latent-space prior whose posteriors and marginal likelihood are Gaussian."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.distributions import constraints

import numpyro_ebm as ebm

NOISE, A, B = 0.5, 3.0, 4.0
W = np.array([1.0, -0.5, 0.8])


def draw_data(num, seed=0):
    """z ~ N(b / (1 + a), 1 / (1 + a)), x | z ~ N(z w, s²)."""
    rng = np.random.default_rng(seed)
    z = B / (1 + A) + rng.normal(size=num) / np.sqrt(1 + A)
    return jnp.asarray(z[:, None] * W + NOISE * rng.normal(size=(num, 3)))


def latent_prior(x):
    """exp(-E(z)) tilts N(0, 1); p(x | z) is normalised."""
    a = numpyro.param("a", 0.0, constraint=constraints.greater_than(-1.0))
    b = numpyro.param("b", 0.0)
    w = jnp.concatenate([jnp.ones(1), numpyro.param("w", jnp.zeros(2))])
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("x", dist.Normal(z[:, None] * w, NOISE).to_event(1), obs=x)
        ebm.energy("E", 0.5 * a * z**2 - b * z)


def marginal_likelihood(params, x):
    w = jnp.concatenate([jnp.ones(1), params["w"]])
    mean, variance = params["b"] / (1 + params["a"]), 1 / (1 + params["a"])
    covariance = variance * jnp.outer(w, w) + NOISE**2 * jnp.eye(3)
    return jnp.mean(dist.MultivariateNormal(mean * w, covariance).log_prob(x))


def log_normalizer(params):
    return 0.5 * (params["b"] ** 2 / (1 + params["a"]) - jnp.log1p(params["a"]))


def truth():
    return {"a": jnp.array(A), "b": jnp.array(B), "w": jnp.asarray(W[1:])}
