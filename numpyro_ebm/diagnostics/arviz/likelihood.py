# SPDX-License-Identifier: Apache-2.0
r"""The log-likelihood of observed rows under a fixed model, in the form that ArviZ works with.

.. math:: \log p(v) = \log\tilde p(v) - \log Z

With fixed parameters it is one number a row, the same at every draw.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from numpyro_ebm.diagnostics.reading import pick_marginal
from numpyro_ebm.errors import ModelError
from numpyro_ebm.keys import default_key
from numpyro_ebm.log_normalizers import LogNormalizer
from numpyro_ebm.model.row_analysis import check_rows_alike
from numpyro_ebm.model.row_model import RowModel
from numpyro_ebm.program.compilation import run_compiled

__all__ = ["log_likelihood_of_rows"]


def log_likelihood_of_rows(
    seen: RowModel | None, log_normalizer: Any, given: Any
) -> tuple[np.ndarray, str, dict[str, Any]]:
    """Log-likelihood of every observed row, and what there is to know of its log Z.

    :param seen: the model read at the rows; ``None`` if there are none, which is an error.
    :param log_normalizer: log Z, a number, one for each row, or a ``LogNormalizer``.
    :param given: instead, the log-likelihoods themselves, with or without their error.
    :return: array (rows,), the name of their plate, and a dict of attributes.
    """
    if seen is None:
        raise ModelError(
            "to_arviz: a log-likelihood is one of observed rows, and there are none. Pass "
            "`observed=rows` (or the model's data, for a fit)."
        )
    if seen.priors:
        raise ModelError(
            f"to_arviz: a log-likelihood is one at values of the parameters {sorted(seen.priors)}, "
            "of which the guide of this fit has a law. Draw them with `numpyro.infer.Predictive("
            "guide, params=fit.params, num_samples=...)`, hold them by `numpyro_ebm.fixed`, and "
            "give that model."
        )
    if given is None:
        log_normalizer = _with_error(log_normalizer)
        values = _log_densities(seen, log_normalizer) - np.asarray(log_normalizer.value, float)
        values = np.asarray(seen.weigh(jnp.asarray(values)), float)
    elif log_normalizer is not None:
        raise ModelError("to_arviz: give `log_normalizer` or `log_likelihood`, not both.")
    else:
        log_normalizer = _with_error(getattr(given, "log_normalizer", None))
        values = np.asarray(getattr(given, "value", given), float)
        if values.shape != (seen.num_rows,):
            raise ModelError(
                f"to_arviz: `log_likelihood` has shape {values.shape}, and {seen.num_rows} rows "
                "are observed."
            )
    return (
        values,
        seen.plate,
        {
            "log_normalizer": np.asarray(log_normalizer.value, float).tolist(),
            "log_normalizer_mcse": np.asarray(log_normalizer.mcse, float).tolist(),
            "log_normalizer_method": log_normalizer.method,
            "log_normalizer_bias": log_normalizer.bias,
        },
    )


def _with_error(log_normalizer):
    """Log Z as a ``LogNormalizer``, of an unknown error if it came without."""
    if isinstance(log_normalizer, LogNormalizer):
        return log_normalizer
    value = np.nan if log_normalizer is None else log_normalizer
    return LogNormalizer(value, np.nan, np.nan, "given")


def _log_densities(seen, log_normalizer):
    """log p̃(v) of every row, once it is known that this log Z belongs to these rows."""
    rows, shape = seen.num_rows, np.shape(log_normalizer.value)
    if shape not in ((), (rows,)):
        raise ModelError(
            f"to_arviz: `log_normalizer` has shape {shape}; it is a number, or one for each of "
            f"the {rows} observed rows."
        )
    if shape == () and rows > 1:
        check_rows_alike(
            seen, "to_arviz: one log Z was given for all rows", f"Give an array of shape ({rows},)."
        )
    try:
        marginal, _, _ = pick_marginal("to_arviz", seen, None, None, None)
    except ModelError as error:
        raise ModelError(
            "to_arviz: the latent sites cannot be summed out. Pass `log_likelihood="
            "numpyro_ebm.log_likelihood(rng_key, model, ..., log_normalizer=log_z, "
            f"with_error=True)` instead of `log_normalizer`. ({error})"
        ) from None

    def log_density():
        u = seen.unconstrain_visible()
        _, log_det = seen.constrain(u)
        bound = marginal.bind(default_key(), seen, None, {}, u, order=1)
        unread = seen.log_reference(seen.visible_values)
        return bound.log_density({}, u) - log_det - unread

    return np.asarray(run_compiled(log_density), float)
