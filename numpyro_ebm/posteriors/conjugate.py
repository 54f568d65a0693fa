# SPDX-License-Identifier: Apache-2.0
r"""Gaussian posteriors in closed form, found by their constant curvature.

.. math:: U(θ) = βN\mathcal L(θ) - \log π(θ) = U(θ_0) + g^\top(θ - θ_0)
    + \tfrac12 (θ - θ_0)^\top P\,(θ - θ_0)

is quadratic where the loss is (score matching and KSD, with an energy linear in θ) and the prior is
normal. The posterior is then :math:`N(θ_0 - P^{-1} g, P^{-1})`, with no sampling: what a sampler
should find.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_ebm.errors import ModelError
from numpyro_ebm.keys import default_key
from numpyro_ebm.posteriors.potential import Potential, hessian_by_differences
from numpyro_ebm.types import SiteValues

__all__ = ["GaussianPosterior", "gaussian_posterior"]


class GaussianPosterior(NamedTuple):
    """A Gaussian posterior.

    - **mean, standard_deviation** - by the name of the parameter.
    - **covariance** - of all coordinates, parameters in the order of their sorted names.
    """

    mean: SiteValues
    standard_deviation: SiteValues
    covariance: np.ndarray


def gaussian_posterior(potential: Potential, learning_rate: float) -> GaussianPosterior:
    """The posterior of a potential, if it is quadratic.

    :param Potential potential: loss and log-prior.
    :param learning_rate: β.
    :return: :class:`GaussianPosterior`.
    :raises ModelError: if it is not quadratic, or has no minimum.
    """
    key = default_key()
    scale = learning_rate * potential.num_rows

    @jax.jit
    @jax.grad
    def gradient(x):
        return scale * potential.loss(x, key) - potential.log_prior(x)

    start = potential.start
    # Differences of the gradient of a quadratic function are exact at any distance.
    here = hessian_by_differences(gradient, start, 1.0)
    tolerance = 10 * float(jnp.finfo(start.dtype).eps) ** 0.5 * np.abs(here).max()
    for shift in jax.random.normal(key, (2, potential.size), start.dtype):
        there = hessian_by_differences(gradient, start + shift, 1.0)
        if not np.abs(there - here).max() <= tolerance:
            raise ModelError(
                "generalized: the posterior is not Gaussian (the curvature of its log-density "
                "changes from place to place), so it has no closed form here. It has one where the "
                "energy is linear in the parameters, the objective is score matching or KSD, and "
                "the priors are normal. Sample it with NUTS."
            )
    if not np.linalg.eigvalsh(here)[0] > 0:
        raise ModelError(
            "generalized: the quadratic posterior is not proper: its precision has the eigenvalue "
            f"{np.linalg.eigvalsh(here)[0]:.3g}. Use narrower priors, or a loss that is bounded "
            "below (KernelSteinDiscrepancy with pairs='square')."
        )
    covariance = np.linalg.inv(here)
    mean = np.asarray(start, float) - covariance @ np.asarray(gradient(start), float)
    deviation = np.sqrt(np.diag(covariance))
    unravel = lambda x: potential.params(jnp.asarray(x, start.dtype))  # noqa: E731
    return GaussianPosterior(unravel(mean), unravel(deviation), covariance)
