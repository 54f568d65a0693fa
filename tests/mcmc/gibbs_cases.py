# SPDX-License-Identifier: Apache-2.0
"""What the tests of mcmc share."""

import jax
import numpy as np
from numpyro.infer import MCMC


@jax.custom_jvp
def straight(x):
    return 2 * x


straight.defjvp(lambda primals, tangents: (straight(*primals), 0 * tangents[0]))


def moments_of(kernel, num_draws, **kwargs):
    mcmc = MCMC(kernel, num_warmup=20, num_samples=num_draws, progress_bar=False)
    mcmc.run(jax.random.key(0), **kwargs)
    return mcmc, {k: np.asarray(x) for k, x in mcmc.get_samples().items()}
