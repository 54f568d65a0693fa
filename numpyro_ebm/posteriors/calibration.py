# SPDX-License-Identifier: Apache-2.0
r"""The learning rate of a generalised posterior, from the spread of its estimator.

.. math:: β = \frac{\operatorname{tr}(H J^{-1} H)}{\operatorname{tr} H}
    \quad\text{(sandwich)}, \qquad
    β = \frac{\sum_b ∇D·∇\log π + \operatorname{tr} ∇^2 D}{\sum_b \|∇D\|^2}
    \quad\text{(bootstrap)}

Reference: Matsubara, Knoblauch, Briol, Oates, *Robust generalised Bayesian inference for
intractable likelihoods*, JRSSB 2022; the same, *Generalised Bayesian inference for discrete
intractable likelihood*, JASA 2023.
"""

from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_ebm.errors import ModelError, check_integer
from numpyro_ebm.posteriors.potential import Potential, hessian_by_differences
from numpyro_ebm.types import SiteValues

__all__ = ["Calibration", "calibrate"]

BATCH_SIZE = 8
"""Data sets whose gradients are taken together."""


class Calibration(NamedTuple):
    """Result of a calibration.

    - **learning_rate** - β.
    - **method** - ``"sandwich"`` or ``"bootstrap"``.
    - **minimizer** - the parameters that minimise the loss over all rows, by name.
    - **standard_error** - standard deviation of the estimator over data sets, in unconstrained
      coordinates, in the order of the sorted names.
    """

    learning_rate: float
    method: str
    minimizer: SiteValues
    standard_error: np.ndarray


def calibrate(
    rng_key: jax.Array,
    potential: Potential,
    method: Literal["sandwich", "bootstrap"],
    num_resamples: int,
) -> Calibration:
    """See :meth:`~numpyro_ebm.generalized.calibrate`."""
    if method not in ("sandwich", "bootstrap"):
        raise ModelError(
            f"generalized: `method` must be 'sandwich' or 'bootstrap', got {method!r}."
        )
    check_integer("generalized", 2, num_resamples=num_resamples)
    key_loss, key_resample = jax.random.split(rng_key)
    resampled = potential.resampled()
    value_and_gradient = jax.jit(jax.value_and_grad(resampled))
    everything = jnp.arange(potential.num_rows)
    at_all = partial(value_and_gradient, rng_key=key_loss, indices=everything)
    best = _minimize(at_all, potential.start)
    hessian = hessian_by_differences(lambda x: at_all(x)[1], best)
    lower = np.linalg.eigvalsh(hessian)[0]
    if not lower > 0:
        raise ModelError(
            "generalized: the Hessian of the loss at its minimum is not positive (smallest "
            f"eigenvalue {lower:.3g}): the data do not determine all parameters. Pass a number as "
            "`learning_rate`, or fix what is not identified."
        )
    gradient = jax.jit(jax.grad(resampled))
    if method == "sandwich":
        covariance = _jackknife(gradient, best, key_loss, potential.num_rows, num_resamples)
        beta = np.trace(hessian @ np.linalg.solve(covariance, hessian)) / np.trace(hessian)
        inverse = np.linalg.inv(hessian)
        spread = inverse @ covariance @ inverse / potential.num_rows
    else:
        beta, spread = _bootstrap(
            potential, value_and_gradient, at_all, best, key_loss, key_resample, num_resamples
        )
    if not (np.isfinite(beta) and beta > 0):
        raise ModelError(
            f"generalized: the {method} calibration gave {beta:.3g}, which is no learning rate. "
            "Try the other method, more rows, or pass a number."
        )
    error = np.sqrt(np.diag(spread))
    return Calibration(float(beta), method, potential.params(jnp.asarray(best)), error)


def _minimize(value_and_gradient, start):
    def on_host(x):
        value, gradient = value_and_gradient(jnp.asarray(x, start.dtype))
        return float(value), np.asarray(gradient, float)

    start = np.asarray(start)
    scale = 1 + np.abs(on_host(start)[1]).max()
    tolerance = scale * float(np.finfo(start.dtype).eps) ** 0.5
    options = {"gtol": tolerance}
    from scipy.optimize import minimize  # a quarter of a second to import

    found = minimize(on_host, start, jac=True, method="BFGS", options=options)
    if not np.isfinite(found.fun) or np.abs(found.jac).max() > 30 * tolerance:
        raise ModelError(
            "generalized: the loss has no minimum that a search from the middle of the priors "
            f"finds (loss {found.fun:.4g}, gradient {np.abs(found.jac).max():.2g} after "
            f"{found.nit} steps). Pass a number as `learning_rate`, or check that the loss is "
            "bounded below."
        )
    return found.x.astype(start.dtype)


def _jackknife(gradient, best, rng_key, num_rows, num_groups):
    """Covariance of the gradient of one row, by leaving groups of rows out."""
    num_groups = min(num_groups, num_rows)
    size = num_rows // num_groups
    out = np.arange(num_groups * size).reshape(num_groups, size)
    kept = np.stack([np.setdiff1d(np.arange(num_rows), rows) for rows in out])
    # Leaving a group out moves the mean by size / (num_rows - size) times the group's deviation.
    means = jax.lax.map(
        lambda indices: gradient(best, rng_key, indices), jnp.asarray(kept), batch_size=BATCH_SIZE
    )
    of_groups = (num_rows - size) / size * np.asarray(means, float)
    return np.atleast_2d(size * np.cov(of_groups.T))


def _bootstrap(potential, value_and_gradient, at_all, best, rng_key, key_resample, num_resamples):
    num_rows = potential.num_rows
    prior_gradient = jax.jit(jax.grad(potential.log_prior))
    above, below, minimizers = 0.0, 0.0, []
    for key in jax.random.split(key_resample, num_resamples):
        indices = jax.random.randint(key, (num_rows,), 0, num_rows)
        x = _minimize(partial(value_and_gradient, rng_key=rng_key, indices=indices), best)
        slope = num_rows * np.asarray(at_all(x)[1], float)
        curvature = num_rows * np.trace(hessian_by_differences(lambda x: at_all(x)[1], x))
        above += slope @ np.asarray(prior_gradient(x), float) + curvature
        below += slope @ slope
        minimizers.append(np.asarray(x, float))
    return above / below, np.atleast_2d(np.cov(np.stack(minimizers).T))
