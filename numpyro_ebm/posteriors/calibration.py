# SPDX-License-Identifier: Apache-2.0
r"""The learning rate of a generalised posterior, from the spread of its estimator.

.. math:: β = \frac{d}{\operatorname{tr}(H^{-1} J)}
    \quad\text{(sandwich, simulation)}, \qquad
    β = \frac{\operatorname{tr}(H J^{-1} H)}{\operatorname{tr} H}
    \quad\text{(trace)}, \qquad
    β = \frac{\sum_b ∇D·∇\log π + \operatorname{tr} ∇^2 D}{\sum_b \|∇D\|^2}
    \quad\text{(bootstrap)}

Reference: Ribatet, Cooley, Davison, *Bayesian inference from composite likelihoods*, Statistica
Sinica 2012; Matsubara, Knoblauch, Briol, Oates, *Robust generalised Bayesian inference for
intractable likelihoods*, JRSSB 2022; the same, *Generalised Bayesian inference for discrete
intractable likelihood*, JASA 2023.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from numpyro_ebm.errors import ModelError, check_integer
from numpyro_ebm.posteriors.minimum import compile_once, find_minimum, polish
from numpyro_ebm.posteriors.potential import Potential, hessian_by_differences
from numpyro_ebm.printed import brief
from numpyro_ebm.program.compilation import (
    run_compiled,
)
from numpyro_ebm.program.progress import Progress
from numpyro_ebm.types import SiteValues

__all__ = ["Calibration", "CalibrationMethod", "calibrate"]

CalibrationMethod: TypeAlias = Literal["sandwich", "trace", "bootstrap", "simulation"]
"""How :meth:`~numpyro_ebm.generalized.calibrate` finds a learning rate."""

METHODS = ("sandwich", "trace", "bootstrap", "simulation")

BATCH_SIZE = 8
"""Data sets whose gradients are taken together."""

FEWEST_GROUPS = (4, 2)
"""Rows, or groups of them, between which a spread is measured, in all and for each parameter."""

ENOUGH_ROWS = (10, 5)
"""The same, where nobody says that they are enough."""

GROUPS_A_PARAMETER = 10

SMALLEST_RATIO = 1e-7
"""Of an eigenvalue of the gradient's covariance, in units of the Hessian, to the largest one."""


class Calibration(NamedTuple):
    """Result of a calibration.

    - **learning_rate** - β.
    - **method** - ``"sandwich"``, ``"trace"``, ``"bootstrap"`` or ``"simulation"``.
    - **minimizer** - the parameters that minimise the loss over all rows, by name.
    - **standard_error** - standard deviation of the estimator over data sets, in unconstrained
      coordinates, in the order of the sorted names; NaN for those that the loss does not read.
    - **point** - the minimiser in these coordinates.
    - **hessian, score_covariance** - H and J there, zero for those that the loss does not read.
    - **informed** - which coordinates the loss reads.
    """

    learning_rate: float
    method: str
    minimizer: SiteValues
    standard_error: np.ndarray
    point: np.ndarray
    hessian: np.ndarray
    score_covariance: np.ndarray
    informed: np.ndarray

    __repr__ = brief


def calibrate(
    rng_key: jax.Array,
    potential: Potential,
    method: CalibrationMethod | None,
    num_resamples: int,
    *,
    groups: ArrayLike | None,
    cap: bool,
    simulate: Callable[..., Any],
    progress_bar: bool = True,
) -> Calibration:
    """See :meth:`~numpyro_ebm.generalized.calibrate`.

    :param simulate: ``(rng_key, params, num) -> values`` of the visible sites of data sets drawn at
        given parameters, data sets leading.
    """
    if method is not None and method not in METHODS:
        raise ModelError(
            f"generalized: `method` must be 'sandwich', 'trace', 'bootstrap' or 'simulation', got "
            f"{method!r}."
        )
    check_integer("generalized", 2, num_resamples=num_resamples)
    potential.check_all_rows()
    key_loss, key_resample = jax.random.split(rng_key)
    value_and_gradient = compile_once(
        jax.value_and_grad(lambda x: potential.loss(x, key_loss)), potential.start
    )
    found = find_minimum(value_and_gradient, potential.start)
    best, hessian, informed = polish(value_and_gradient, found)
    block = np.ix_(informed, informed)
    labels, num_groups = _labels_of_groups(groups, potential.num_rows)
    method = _checked_method(method, num_groups, int(np.sum(informed)), groups)
    num_resamples = max(num_resamples, GROUPS_A_PARAMETER * int(np.sum(informed)))
    if method == "bootstrap":
        beta, covariance = _bootstrap(
            potential,
            value_and_gradient,
            best,
            hessian,
            key_loss,
            key_resample,
            num_resamples,
            progress_bar,
        )
    elif method == "simulation":
        values = simulate(key_resample, potential.params(jnp.asarray(best)), num_resamples)
        covariance = _over_data_sets(potential, best, key_loss, values)
        beta = _closest_rate(hessian[block], covariance[block])
    else:
        covariance = _over_rows(potential, best, key_loss, num_resamples, labels)
        rate = _closest_rate if method == "sandwich" else _trace_rate
        beta = rate(hessian[block], covariance[block])
    _check_covariance(hessian[block], covariance[block])
    if not (np.isfinite(beta) and beta > 0):
        raise ModelError(
            f"generalized: the {method} calibration gave {beta:.3g}, which is no learning rate. "
            "Try the other method, more rows, or pass a number."
        )
    inverse = np.linalg.inv(hessian[block])
    error = np.full(len(hessian), np.nan)
    variances = np.diag(inverse @ covariance[block] @ inverse) / potential.num_rows
    error[informed] = np.sqrt(variances)
    return Calibration(
        min(1.0, float(beta)) if cap else float(beta),
        method,
        potential.params(jnp.asarray(best)),
        error,
        np.asarray(best, float),
        hessian,
        covariance,
        informed,
    )


def _check_covariance(hessian, covariance):
    """Raise where the estimator has no spread in some direction."""
    ratios = np.linalg.eigvals(np.linalg.solve(hessian, covariance)).real
    if not ratios.min() > SMALLEST_RATIO * ratios.max() > 0:
        raise ModelError(
            "generalized: the gradient of the loss does not vary from row to row in some direction "
            "of the parameters, so that the spread of their estimator is not known. Use more rows, "
            "method='simulation', or pass a number as `learning_rate`."
        )


def _labels_of_groups(groups, num_rows):
    if groups is None:
        return None, num_rows
    groups = np.asarray(groups)
    if groups.shape != (num_rows,):
        raise ModelError(
            f"generalized: `groups` names the group of each of the {num_rows} rows, and has the "
            f"shape {groups.shape}."
        )
    found, labels = np.unique(groups, return_inverse=True)
    return labels, len(found)


def _checked_method(method, num_groups, size, groups):
    """The method; where none was asked for, by the number of rows or groups there are."""
    enough, fewest = (max(num, each * size) for num, each in (ENOUGH_ROWS, FEWEST_GROUPS))
    if groups is not None and method in ("bootstrap", "simulation"):
        raise ModelError(
            f"generalized: method='{method}' takes no `groups`. Use 'sandwich' or 'trace'."
        )
    if method is None and groups is None:
        return "sandwich" if num_groups >= enough else "simulation"
    if method != "simulation" and num_groups < fewest:
        what = "rows" if groups is None else "groups of rows"
        raise ModelError(
            f"generalized: a calibration by the spread over {what} wants at least {fewest} for "
            f"{size} parameters, and there are {num_groups}. Use method='simulation', which draws "
            "data sets of the fitted model, or pass a number as `learning_rate`."
        )
    return method or "sandwich"


def _closest_rate(hessian, covariance):
    """The β whose Gaussian is closest to that of the estimator, in Kullback-Leibler divergence."""
    return len(hessian) / np.trace(np.linalg.solve(hessian, covariance))


def _trace_rate(hessian, covariance):
    return np.trace(hessian @ np.linalg.solve(covariance, hessian)) / np.trace(hessian)


def _over_rows(potential, best, rng_key, num_groups, labels):
    """Covariance J of the gradient of one row, by giving one group of rows after another no weight.

    Without labels groups are rows that follow each other.
    """
    num_rows = potential.num_rows
    if labels is None:
        num_groups = min(num_groups, num_rows)
        labels = np.arange(num_rows) * num_groups // num_rows
    best, labels, num_groups = jnp.asarray(best), jnp.asarray(labels), int(np.max(labels)) + 1
    gradient = jax.grad(potential.loss)

    def without(group):
        return gradient(best, rng_key, jnp.where(labels == group, 0.0, 1.0))

    groups = jnp.arange(num_groups)
    means = run_compiled(lambda x: jax.lax.map(without, x, batch_size=BATCH_SIZE), groups)
    means = np.asarray(means, float)
    sums = num_rows * (means.mean(0) - means)  # over the rows of each group
    return num_groups / (num_groups - 1) * sums.T @ sums / num_rows


def _over_data_sets(potential, best, rng_key, values):
    """The same, by the gradient over all rows of simulated data sets."""
    gradient = jax.grad(potential.loss_at)

    def at(values):
        return gradient(jnp.asarray(best), rng_key, values)

    gradients = run_compiled(lambda x: jax.lax.map(at, x, batch_size=BATCH_SIZE), values)
    return potential.num_rows * np.atleast_2d(np.cov(np.asarray(gradients, float).T))


def _bootstrap(potential, at_all, best, hessian, rng_key, key_resample, num_resamples, shown):
    num_rows = potential.num_rows
    prior_gradient = jax.jit(jax.grad(potential.log_prior))
    once = jnp.ones(num_rows)
    value_and_gradient = compile_once(
        jax.value_and_grad(potential.loss), potential.start, rng_key, once
    )
    above, below, minimizers = 0.0, 0.0, []
    with Progress("calibrate (bootstrap)", num_resamples, shown=shown) as progress:
        for key in jax.random.split(key_resample, num_resamples):
            drawn = jax.random.randint(key, (num_rows,), 0, num_rows)
            weights = jnp.zeros(num_rows).at[drawn].add(1.0)
            x = find_minimum(lambda x: value_and_gradient(x, rng_key, weights), best)  # noqa: B023
            slope = num_rows * np.asarray(at_all(x)[1], float)
            curvature = num_rows * np.trace(hessian_by_differences(lambda x: at_all(x)[1], x))
            above += slope @ np.asarray(prior_gradient(x), float) + curvature
            below += slope @ slope
            minimizers.append(np.asarray(x, float))
            progress.step()
    spread = np.atleast_2d(np.cov(np.stack(minimizers).T))
    return above / below, num_rows * hessian @ spread @ hessian
