# SPDX-License-Identifier: Apache-2.0
"""Estimates of one log Z by several methods: whether they agree, and which is the best."""

import itertools
import math
import warnings
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import lax

from numpyro_ebm._compat import find_stack_level, not_jax_tracer
from numpyro_ebm.errors import NormalizerDisagreementWarning
from numpyro_ebm.log_normalizers.result import LogNormalizer

__all__ = ["best_of"]

MOST_ERRORS = 4.0  # combined standard errors that two methods may differ by


def best_of(results: Sequence[LogNormalizer]) -> LogNormalizer:
    """The result with the smallest error, all of them in its diagnostics.

    :param list results: a :class:`~numpyro_ebm.log_normalizers.LogNormalizer` of each method.
    :return: one of them.

    Warns :class:`~numpyro_ebm.errors.NormalizerDisagreementWarning` if two differ by more than four
    of their combined errors.
    """
    for one, other in itertools.combinations(results, 2):
        gap = lax.stop_gradient(jnp.abs(jnp.subtract(one.value, other.value)))
        eps = float(jnp.finfo(jnp.result_type(gap, float)).eps)
        rounding = 100 * eps * (1 + jnp.abs(lax.stop_gradient(one.value)))
        allowed = MOST_ERRORS * jnp.sqrt(jnp.asarray(one.mcse) ** 2 + jnp.asarray(other.mcse) ** 2)
        if not_jax_tracer(gap) and np.any(np.asarray(gap > allowed + rounding)):
            at = int(np.argmax(np.ravel(gap - allowed)))
            values = [
                f"{x.method} gives {np.ravel(x.value)[at]:.6g} ± "
                f"{np.ravel(np.broadcast_to(x.mcse, np.shape(x.value)))[at]:.2g}"
                for x in (one, other)
            ]
            warnings.warn(
                NormalizerDisagreementWarning(
                    f"log_normalizer: {' and '.join(values)}, further apart than their errors "
                    "allow. Annealed estimates that miss a mode are too small: raise "
                    "`num_temperatures`, `num_particles` or `num_sweeps` until they agree."
                ),
                stacklevel=find_stack_level(),
            )
    errors = [float(np.max(x.mcse)) if not_jax_tracer(x.mcse) else math.inf for x in results]
    best = results[int(np.argmin(errors))]
    by_method = {x.method: x for x in results}
    return best._replace(diagnostics={**(best.diagnostics or {}), "results": by_method})
