# SPDX-License-Identifier: Apache-2.0
"""What the tests of diagnostics share."""

import jax
import numpy as np
import numpyro
import oracles
from numpyro.infer import MCMC, Gibbs

import numpyro_ebm as ebm

KEY = jax.random.key(0)


def own_grbm():
    """Parameters of the GRBM, the model that has them, and those of the guide at its posterior.

    Copies, for each file of tests its own: JAX remembers a NumPy array that a function closes over
    in the precision it met it in first, and others meet it in double precision.
    """
    params = {name: np.array(x) for name, x in oracles.GRBM.items()}
    return params, ebm.fixed(oracles.grbm, params), {"A": params["W"], "d": params["c"]}


def all_states(num_hidden=3):
    return (np.arange(2**num_hidden)[:, None] >> np.arange(num_hidden)) & 1


def gaussian(data=None, *, precision=1.0):
    with numpyro.plate("data", 1 if data is None else len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", 0.5 * precision * v**2)


GAUSSIAN = ebm.fixed(gaussian, {})


def conditional(data=None, x=None):
    with numpyro.plate("data", 3):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", 0.5 * (v - x) ** 2)


def chain(kernel, num_chains=2, num_samples=60, extra_fields=(), args=()):
    mcmc = MCMC(
        kernel,
        num_warmup=40,
        num_samples=num_samples,
        num_chains=num_chains,
        chain_method=jax.vmap if isinstance(kernel, Gibbs) else "vectorized",
        progress_bar=False,
    )
    mcmc.run(KEY, *args, extra_fields=extra_fields)
    return mcmc


LOG_Z = float(ebm.models.grbm_log_normalizer(own_grbm()[0]))


def log_likelihood(data):
    return np.array([oracles.grbm_log_density(oracles.GRBM, v) for v in data]) - LOG_Z
