# SPDX-License-Identifier: Apache-2.0
"""The minimiser of a loss and the Hessian there, where there is one."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_ebm.errors import ModelError
from numpyro_ebm.posteriors.potential import hessian_by_differences
from numpyro_ebm.program.compilation import compiler_options, constants_as_arguments

__all__ = ["compile_once", "find_minimum", "polish"]

NEWTON_STEPS = 5
SHORT_STEP = 0.01
"""Of a coordinate and one, the last of Newton's steps to a minimum."""


def find_minimum(value_and_gradient: Callable[..., Any], start: Any) -> np.ndarray:
    """A point of next to no gradient.

    :param value_and_gradient: of the loss, at a vector.
    :param start: where the search begins.
    :raises ModelError: if it finds none.
    """

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


def compile_once(fn: Callable[..., Any], *args: Any) -> Callable[..., Any]:
    """A function compiled for arguments like these; data that it closes over are no constants."""
    program, constants = constants_as_arguments(fn, *args)
    return partial(jax.jit(program, compiler_options=compiler_options()), constants)


def polish(
    value_and_gradient: Callable[..., Any], x: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Minimiser and Hessian by Newton's method, and which coordinates the loss reads at all.

    Where a loss falls towards infinity, its gradient is next to nothing far out, and every step of
    Newton's is as long as the last one.

    :raises ModelError: if there is no minimum, or the Hessian there is not positive.
    """
    for _ in range(NEWTON_STEPS):
        hessian = hessian_by_differences(lambda x: value_and_gradient(x)[1], x)
        informed = np.any(hessian != 0, 0)  # exactly 0 where the loss does not read a coordinate
        block = np.ix_(informed, informed)
        _check_hessian(hessian[block])
        gradient = np.asarray(value_and_gradient(jnp.asarray(x))[1], float)
        step = np.zeros(len(x))
        step[informed] = np.linalg.solve(hessian[block], gradient[informed])
        if np.all(np.abs(step) < SHORT_STEP * (1 + np.abs(x))):
            return x, hessian, informed
        x = (x - step).astype(x.dtype)
    raise ModelError(
        "generalized: the loss has no minimum: it falls further and further, towards parameters of "
        f"{np.abs(x).max():.3g} and beyond, as where the data are separable. Pass a number as "
        "`learning_rate`, or use fewer parameters."
    )


def _check_hessian(hessian):
    lower = np.linalg.eigvalsh(hessian)[0] if len(hessian) else 0.0
    if not lower > 0:
        raise ModelError(
            "generalized: the Hessian of the loss at its minimum is not positive (smallest "
            f"eigenvalue {lower:.3g}): the data do not determine all parameters. Pass a number as "
            "`learning_rate`, or fix what is not identified. (Of a hierarchy the parameters of the "
            "rows are determined, and theirs are left to the prior, if it is centred: "
            "`theta ~ Normal(mu, tau)`, and not `mu + tau * z`.)"
        )
