# SPDX-License-Identifier: Apache-2.0
"""What the tests of mcmc share."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from numpyro.infer import MCMC
from registry.kernels import kernels

import numpyro_ebm as ebm

COVARIANCE = np.array([[1.0, 0.8], [0.8, 2.0]])
PRECISION = np.linalg.inv(COVARIANCE)
KERNELS = kernels(moves_discrete=False)
slow = partial(pytest.param, marks=pytest.mark.slow)


def make(name, model, **options):
    return KERNELS[name].make(model, **options)


def skewed(num_rows=20):
    """Asymmetric and correlated: a Gumbel scalar beside a correlated Gaussian."""
    with numpyro.plate("data", num_rows):
        v = numpyro.sample("v", ebm.Lebesgue((2,)))
        g = numpyro.sample("g", ebm.Lebesgue())
        ebm.energy("E", 0.5 * jnp.einsum("ni,ij,nj->n", v, PRECISION, v))
        ebm.energy("F", g + jnp.exp(-g))


def run(kernel, num_samples=1_000, num_warmup=300, seed=0, num_chains=1, **options):
    kwargs = {k: options.pop(k) for k in ("num_rows", "init_params") if k in options}
    fields = options.pop("extra_fields", ())
    if num_chains > 1:
        options.setdefault("chain_method", "vectorized")
    mcmc = MCMC(
        kernel,
        num_warmup=num_warmup,
        num_samples=num_samples,
        num_chains=num_chains,
        progress_bar=False,
        **options,
    )
    mcmc.run(jax.random.key(seed), extra_fields=fields, **kwargs)
    return mcmc, {k: np.asarray(x) for k, x in mcmc.get_samples(group_by_chain=True).items()}


MEANS, SHARES, SPREAD = np.array([[-2.0, 0.0], [2.0, 1.0]]), np.array([0.3, 0.7]), 0.3


def noised_mixture(sigma, num_rows=2_000):
    """A mixture of two Gaussians, noised: each variance grows by σ²."""
    variance = SPREAD**2 + sigma**2
    with numpyro.plate("data", num_rows):
        v = numpyro.sample("v", ebm.Lebesgue((2,)))
        # Fresh constants: JAX keeps NumPy's in the first precision in which it meets them.
        means, shares = jnp.array(MEANS.tolist()), jnp.array(SHARES.tolist())
        squares = jnp.sum((v[:, None] - means) ** 2, -1)
        terms = -0.5 * squares / variance + jnp.log(shares) - jnp.log(variance)
        ebm.energy("E", -jax.scipy.special.logsumexp(terms, axis=-1))


def init(kernel, num_warmup=10, params=None, **kwargs):
    return kernel.init(jax.random.key(0), num_warmup, params, (), kwargs)
