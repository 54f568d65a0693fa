# SPDX-License-Identifier: Apache-2.0
"""Mistakes that NumPyro or JAX meets first, by the words that the index of errors quotes."""

import numpyro
import numpyro.distributions as dist
from mistakes.setting import FIXED, KEY, LINE, Mistake, X, bayesian, chain
from numpyro.handlers import seed, trace
from numpyro.infer import MCMC, NUTS, Gibbs, init_to_value

import numpyro_ebm as ebm


def without_chains():
    MCMC(ebm.MALA(FIXED), num_warmup=1, num_samples=1, num_chains=0).run(KEY)


def without_brackets():
    numpyro.sample("v", dist.Normal)  # pyright: ignore


def coin():
    numpyro.sample("p", dist.Beta(2.0, 2.0))


OTHERS = {
    "`AssertionError` without words": [
        Mistake(lambda: chain(ebm.MALA(FIXED), extra_fields="energy"), "^$", AssertionError),
        Mistake(lambda: chain(NUTS(coin), init_params={"b": 1.0}), "^$", AssertionError),
    ],
    "unhashable type": [Mistake(lambda: chain(NUTS(FIXED), init_params=X[:1]), "", TypeError)],
    "argument of type 'NoneType' is not": [
        Mistake(lambda: chain(NUTS(FIXED, init_strategy=init_to_value(values=None))), "", TypeError)
    ],
    "Each block must be a `(kernel, sites)` pair": [
        Mistake(lambda: Gibbs([ebm.MALA(FIXED)]), "", ValueError)  # pyright: ignore
    ],
    "tuple index out of range": [Mistake(without_chains, "", IndexError)],
    "Invalid type for 'fn'": [
        Mistake(lambda: trace(seed(without_brackets, KEY)).get_trace(), "", TypeError)
    ],
    "() missing 1 required positional argument": [
        Mistake(lambda: ebm.ULA(FIXED), "", TypeError),  # pyright: ignore
        Mistake(lambda: chain(ebm.Exchange(bayesian, ebm.ULA), LINE), "", TypeError),
    ],
}
