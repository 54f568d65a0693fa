# SPDX-License-Identifier: Apache-2.0
r"""The open-faced sandwich: draws of a generalised posterior, moved to the width of its estimator.

.. math:: θ \leftarrow \hat θ + A(θ - \hat θ), \qquad A = \sqrt β\, H^{-1} J^{1/2} H^{1/2}

takes the covariance :math:`(βNH)^{-1}` of the draws to :math:`H^{-1}JH^{-1}/N`, that of the
minimiser over data sets, in every direction. With :math:`C_1 = (βNH + Q)^{-1}` and
:math:`C_2 = (N H J^{-1} H + Q)^{-1}`, and q and Q the slope and the curvature of
:math:`\log π` at the minimiser,

.. math:: θ \leftarrow \hat θ + C_2 q + A(θ - \hat θ - C_1 q), \qquad
    A = C_1 (C_1^{-1} C_2 C_1^{-1})^{1/2} C_1^{-1/2}

does the same beside a prior: for flat priors it is the first line, and where the prior alone speaks
nothing moves.

Reference: Shaby, *The open-faced sandwich adjustment for MCMC using estimating functions*, JCGS
2014; Ribatet, Cooley, Davison, *Bayesian inference from composite likelihoods*, Statistica Sinica
2012.
"""

import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_ebm._compat import find_stack_level
from numpyro_ebm.errors import ModelError, WidthWarning
from numpyro_ebm.posteriors.calibration import Calibration
from numpyro_ebm.posteriors.potential import Potential
from numpyro_ebm.program.compilation import run_compiled

__all__ = ["AffineMap", "adjust_draws", "sandwich_map"]

FEWEST_DRAWS = 50
RATIOS = (0.6, 1.6)
MOST_SHIFT = 1.0
"""Of draws and of the Gaussian that an affine map takes them for: deviations, and centres."""

BATCH_SIZE = 64
"""Draws at which the prior's curvature is taken together."""


class AffineMap(NamedTuple):
    """x ← target + matrix (x - source), all relative to the minimiser; leading axes may be draws.

    - **matrix** - A, (..., d, d).
    - **source, target** - centres of the draws and of what they become, (..., d).
    - **root** - symmetric root of the precision that the draws should have, (..., d, d).
    """

    matrix: np.ndarray
    source: np.ndarray
    target: np.ndarray
    root: np.ndarray

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return self.target + np.squeeze(self.matrix @ (x - self.source)[..., None], -1)

    def standardize(self, x: np.ndarray) -> np.ndarray:
        """Draws, as they should be, in coordinates in which they are N(0, I)."""
        return np.squeeze(self.root @ (x - self.source)[..., None], -1)


def sandwich_map(
    hessian: np.ndarray,
    score_covariance: np.ndarray,
    num_rows: float,
    learning_rate: float,
    slope: np.ndarray | float = 0.0,
    curvature: np.ndarray | float = 0.0,
) -> AffineMap:
    """The map of the module's docstring.

    :param hessian: H, (d, d).
    :param score_covariance: J, (d, d).
    :param num_rows: N.
    :param learning_rate: β of the draws.
    :param slope: q, (..., d); 0 for a flat prior.
    :param curvature: Q, (..., d, d). Directions in which the prior curves upwards, as in the tails
        of a Cauchy, count as flat.
    :return: :class:`AffineMap`.
    """
    size = len(hessian)
    slope = np.broadcast_to(slope, np.shape(slope) or (size,))
    flat, directions = np.linalg.eigh(np.broadcast_to(curvature, (*slope.shape, size)))
    curvature = (directions * np.maximum(flat, 0.0)[..., None, :]) @ _transpose(directions)
    inverse = np.linalg.inv(hessian)
    spread = inverse @ score_covariance @ inverse / num_rows
    before = learning_rate * num_rows * hessian + curvature
    after = np.linalg.solve(
        np.eye(size) + spread @ curvature, np.broadcast_to(spread, before.shape)
    )
    scores = before @ after @ before
    root = _root(before)
    matrix = np.linalg.solve(before, _root(0.5 * (scores + _transpose(scores))) @ root)
    source = np.linalg.solve(before, slope[..., None])[..., 0]
    return AffineMap(matrix, source, (after @ slope[..., None])[..., 0], root)


def adjust_draws(
    samples: dict[str, Any], potential: Potential, calibration: Calibration, learning_rate: float
) -> dict[str, Any]:
    """See :meth:`~numpyro_ebm.generalized.adjust`."""
    batch = _batch_shape(samples, potential)
    draws = {
        name: jnp.reshape(jnp.asarray(samples[name]), (-1, *shape))
        for name, shape in potential.shapes.items()
    }
    x = np.array(run_compiled(jax.vmap(potential.coordinates), draws), float)
    point, informed = calibration.point, calibration.informed
    slope, curvature = _prior_at(x, point, informed, potential)
    block = np.ix_(informed, informed)
    move = sandwich_map(
        calibration.hessian[block],
        calibration.score_covariance[block],
        potential.num_rows,
        learning_rate,
        slope,
        curvature,
    )
    away = x[:, informed] - point[informed]
    _check_gaussian(move.standardize(away))
    x[:, informed] = point[informed] + move(away)
    moved = run_compiled(potential.values, jnp.asarray(x, potential.start.dtype))
    return {k: jnp.reshape(v, (*batch, *v.shape[1:])) for k, v in moved.items() if k in samples}


def _check_gaussian(standardized):
    """Warn where draws are not what the curvature at the minimiser says that they are."""
    if len(standardized) < FEWEST_DRAWS:
        return
    ratios, center = standardized.std(0), np.abs(standardized.mean(0)).max()
    lower, upper = RATIOS
    if lower < ratios.min() and ratios.max() < upper and center < MOST_SHIFT:
        return
    warnings.warn(
        WidthWarning(
            "generalized.adjust: the draws are not those of a posterior that is close to a "
            f"Gaussian: they are {ratios.min():.2g} to {ratios.max():.2g} times as wide as the "
            "curvature of the loss and the prior says, and their centre is off by "
            f"{center:.2g} deviations. Adjusted widths are rough then. Were they drawn at another "
            "learning rate or of other data, or from chains that have not converged? Are there "
            "few rows for the parameters, or a parameter near its bound?"
        ),
        stacklevel=find_stack_level(),
    )


def _batch_shape(samples, potential):
    """Leading axes of the draws, such as (chains, draws)."""
    missing = [name for name in potential.shapes if name not in samples]
    if missing:
        raise ModelError(
            f"generalized.adjust: the draws lack the parameter(s) {missing}; give all of them, as "
            "`mcmc.get_samples()` or a guide's `sample_posterior` return them."
        )
    found = set()
    for name, shape in potential.shapes.items():
        of_draws = np.shape(samples[name])
        num = len(of_draws) - len(shape)
        if num < 0 or of_draws[num:] != shape:
            raise ModelError(
                f"generalized.adjust: draws of '{name}' have the shape {of_draws}, and a draw of "
                f"it {shape}."
            )
        found.add(of_draws[:num])
    if len(found) > 1:
        raise ModelError(
            f"generalized.adjust: the parameters have draws of different shapes, {sorted(found)}."
        )
    return found.pop()


def _prior_at(x, point, informed, potential):
    """Slope and curvature of log π at the minimiser, given what the loss does not read.

    Without such coordinates they are the same for all draws, and without the axis of draws.
    """
    indices = np.flatnonzero(informed)

    def along(rest):
        def log_prior(part):
            return potential.log_prior(rest.at[indices].set(part))

        at = jnp.asarray(point[indices], potential.start.dtype)
        return jax.grad(log_prior)(at), -jax.hessian(log_prior)(at)

    if np.all(informed):
        found = run_compiled(along, potential.start)
    else:
        rest = jnp.asarray(x, potential.start.dtype)
        found = run_compiled(lambda x: jax.lax.map(along, x, batch_size=BATCH_SIZE), rest)
    return tuple(np.asarray(part, float) for part in found)


def _root(matrix):
    """Symmetric root of a positive semi-definite matrix."""
    squares, directions = np.linalg.eigh(matrix)
    return (directions * np.sqrt(np.maximum(squares, 0.0))[..., None, :]) @ _transpose(directions)


def _transpose(matrix):
    return np.swapaxes(matrix, -1, -2)
