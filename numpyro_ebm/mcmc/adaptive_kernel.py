# SPDX-License-Identifier: Apache-2.0
"""What the kernels share that have a step size, which their warm-up may adapt."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from numpyro_ebm.errors import ModelError, check_fraction, check_positive
from numpyro_ebm.mcmc.adaptation import acceptance_tuner
from numpyro_ebm.mcmc.row_kernel import RowKernel
from numpyro_ebm.types import Model

__all__ = ["AdaptiveKernel"]


class AdaptiveKernel(RowKernel):
    """A kernel with a step size, which its warm-up may adapt to an acceptance probability."""

    default_step_size = 0.1

    def __init__(
        self,
        model: Model,
        step_size: float | None,
        init_strategy: Callable[..., Any],
        adapt_step_size: bool,
        target_accept_prob: float | None,
    ):
        if step_size is not None:
            check_positive(self._name, step_size=step_size)
        if target_accept_prob is not None:
            check_fraction(self._name, target_accept_prob=target_accept_prob)
        self._step_size = step_size
        self._adapt_step_size = adapt_step_size
        self._target_accept_prob: Any = target_accept_prob  # `None` where a kernel finds its own
        super().__init__(model, init_strategy)

    @property
    def needs_warmup(self) -> bool:
        return self._step_size is None

    def get_diagnostics_str(self, state: Any) -> str:
        return (
            f"step size {jnp.median(state.adapt_state.step_size):.2e}. "
            f"acc. prob={jnp.mean(state.mean_accept_prob):.2f}"
        )

    def _initial_step_size(self, dimension=1):
        """The step size at the start, for rows of so many coordinates."""
        return self.default_step_size if self._step_size is None else self._step_size

    def _tuner(self):
        """What adapts the step size of a row.

        With the default γ of 0.05 it swings so much with the acceptance of a single row that the
        mean of its logarithm misses the target.
        """
        return acceptance_tuner(self._target_accept_prob, 0.2)

    def _check_warmup(self):
        if self.needs_warmup and not (self._adapt_step_size and self._num_warmup > 0):
            raise ModelError(
                f"{self._name}: without warm-up adaptation (`num_warmup` > 0 and "
                "`adapt_step_size=True`) pass a `step_size`."
            )
