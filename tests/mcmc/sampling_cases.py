# SPDX-License-Identifier: Apache-2.0
"""What the tests of mcmc share."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro.infer import MCMC

import numpyro_ebm as ebm


def run(kernel, num_samples=2_000, num_warmup=500, seed=0, num_chains=1, **options):
    kwargs = {k: options.pop(k) for k in ("num_rows", "init_params") if k in options}
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
    mcmc.run(jax.random.key(seed), **kwargs)
    return mcmc, {k: np.asarray(x) for k, x in mcmc.get_samples(group_by_chain=True).items()}


def units(num_units=20):
    with numpyro.plate("data", 1):
        v = numpyro.sample("v", ebm.Lebesgue())
        h = numpyro.sample("h", ebm.Counting(2, (num_units,)))
        ebm.energy("E", 0.5 * v**2 - v * jnp.mean(h, -1) ** 2)


def bits():
    with numpyro.plate("data", 1):
        h = numpyro.sample("h", ebm.Counting(2, (3,)))
        ebm.energy("E", -h @ jnp.array([1.0, -1.0, 0.5]) - 0.5 * h[:, 0] * h[:, 1])
