# SPDX-License-Identifier: Apache-2.0
r"""Whether a change depends on parameters, where its variance may depend on them as well.

A weighted linear regression of y on x = (1, θ), and the Wald statistic of no coefficients at all,

.. math::
    \hat β = (X^T W X)^{-1} X^T W y, \qquad
    V = (X^T W X)^{-1} X^T \operatorname{diag}\Big(\frac{w e}{1 - h}\Big)^2 X (X^T W X)^{-1}, \qquad
    \hat β^T V^{-1} \hat β

with the residuals e and the leverages h: White's covariance, corrected for a few draws far out as
in HC3 (MacKinnon and White, "Some heteroskedasticity-consistent covariance matrix estimators with
improved finite sample properties", Journal of Econometrics 29, 1985).
"""

import numpy as np
from jax.typing import ArrayLike

from numpyro_ebm.errors import ModelError

__all__ = ["regress"]


def regress(
    change: np.ndarray, proposal: ArrayLike, weight: np.ndarray
) -> tuple[list[np.ndarray], list[np.ndarray], float, int]:
    """Regression of changes on the parameters at which they happened, group by group.

    Every auxiliary chain is run afresh, so that given θ' the changes are independent.

    :param change: y, of shape (chains, draws) or (chains, draws, groups).
    :param proposal: θ', whose leading axes are those of ``change``.
    :param weight: w, of the shape of ``change``, of mean 1.
    :return: squares fitted and squares left, an array for each group; the Wald statistic, summed
        over the groups; and its degrees of freedom.
    :raises ModelError: for less than ten draws a coefficient.

    **Example**

    >>> rng = np.random.default_rng(0)
    >>> theta = rng.normal(size=(4, 250))
    >>> noise = 0.1 * theta * rng.normal(size=theta.shape)  # its variance depends on θ'
    >>> weight = np.ones(theta.shape)
    >>> *_, statistic, degrees = regress(noise, theta, weight)
    >>> statistic < 9.2, degrees  # the 99 % quantile of χ² with two degrees
    (True, 2)
    >>> regress(noise + 0.05 * theta, theta, weight)[2] > 50
    True
    """
    theta = np.asarray(proposal, float).reshape(*change.shape, -1)
    if change.ndim == 2:  # without groups: one
        change, theta, weight = change[:, :, None], theta[:, :, None], weight[:, :, None]
    statistic, fitted, left, degrees = 0.0, [], [], 0
    for group in range(change.shape[2]):
        y, w = change[:, :, group].ravel(), weight[:, :, group].ravel()
        x = theta[:, :, group].reshape(y.size, -1)
        x = x - np.average(x, 0, w)
        x = x / np.maximum(np.sqrt(np.average(x**2, 0, w)), 1e-30)
        x = np.concatenate([np.ones((y.size, 1)), x], 1)
        if y.size < 10 * x.shape[1]:
            raise ModelError(
                f"auxiliary_adequacy: {y.size} draws are too few for {x.shape[1] - 1} parameters."
            )
        inverse = np.linalg.pinv(x.T @ (x * w[:, None]))
        slope = inverse @ (x.T @ (w * y))
        rest = y - x @ slope
        leverage = np.minimum(w * np.einsum("ni,ij,nj->n", x, inverse, x), 0.99)
        covariance = inverse @ (x.T * (w * rest / (1 - leverage)) ** 2) @ x @ inverse
        statistic += float(slope @ np.linalg.pinv(covariance) @ slope)
        fitted.append(w * (x @ slope) ** 2)
        left.append(w * rest**2)
        degrees += x.shape[1]
    return fitted, left, statistic, degrees
