# SPDX-License-Identifier: Apache-2.0
r"""How wide the posterior of every parameter is beside its prior.

.. math:: \frac{q_{.84}(θ \mid x) - q_{.16}(θ \mid x)}{q_{.84}(θ) - q_{.16}(θ)}

is the ratio of standard deviations where both are Gaussian, and there is one for a prior without a
variance, such as a half-Cauchy.
"""

from functools import partial
from typing import Any

import numpy as np
from numpyro.infer import MCMC, Predictive

from numpyro_ebm._compat import run_arguments
from numpyro_ebm.keys import default_key
from numpyro_ebm.model.priors import isolated, prior_part, read_with_priors

__all__ = ["median_width", "prior_widths"]

NUM_DRAWS = 2_000
"""Draws of the prior: a width is known to 3 %."""


def prior_widths(mcmc: MCMC, kernel: Any) -> dict[str, np.ndarray]:
    """Width of the posterior of every parameter of a kernel, in units of that of its prior.

    :param mcmc: a run.
    :param kernel: its kernel on parameters with priors, or that of one of its blocks.
    :return: dict of arrays of the shapes of the parameters, 1 where the data say nothing.
    """
    model = kernel.model
    while isinstance(model, partial):  # what `Gibbs` makes of the models of its blocks
        model = model.args[0]
    args, kwargs = run_arguments(mcmc)
    row_model = read_with_priors(model, args, kwargs, "prior_widths")
    draws = mcmc.get_samples()
    names = [name for name in row_model.priors if name in draws]
    prior = Predictive(prior_part(model, row_model.plate), num_samples=NUM_DRAWS)
    with isolated():
        drawn = prior(default_key(), *args, **kwargs)
    return {name: _width(draws[name]) / _width(drawn[name]) for name in names}


def _width(draws):
    low, high = np.quantile(np.asarray(draws, float), (0.16, 0.84), axis=0)
    return np.maximum(high - low, np.finfo(float).tiny)


def median_width(widths: dict[str, np.ndarray]) -> float:
    """The median over all elements of all parameters."""
    return float(np.median(np.concatenate([np.ravel(x) for x in widths.values()])))
