# SPDX-License-Identifier: Apache-2.0
"""The chains of persistent contrastive divergence, and what is remembered of their rounds."""

import warnings
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from numpyro.diagnostics import split_gelman_rubin

from numpyro_ebm._compat import find_stack_level
from numpyro_ebm.errors import ConvergenceWarning, ModelError
from numpyro_ebm.types import SiteValues

__all__ = ["Chains"]

HISTORY, SPACING = 64, 4
"""Positions of the persistent chains that are remembered for R-hat, and the rounds between them."""

R_HAT_OF_STUCK_CHAINS = 3.0
"""R-hat over the remembered rounds above which a run warns: the chains have hardly moved."""


class Chains(NamedTuple):
    """Persistent chains, one a row of the batch.

    - **position** - unconstrained values of the sites that the kernel moves, by name.
    - **history** - their visible coordinates and, last, the energy, after every fourth round:
      (64, rows, coordinates + 1); a ring.
    - **num_rounds** - rounds so far.
    """

    position: SiteValues
    history: jax.Array
    num_rounds: jax.Array

    @classmethod
    def start(cls, position: SiteValues, coordinates: jax.Array) -> "Chains":
        """Chains at these positions, with visible coordinates of shape (rows, coordinates)."""
        rows, size = coordinates.shape
        return cls(position, jnp.zeros((HISTORY, rows, size + 1)), jnp.array(0))

    def check(self, num_rows: int) -> None:
        """Raise unless there is a chain for each of the rows of a batch."""
        rows = self.history.shape[1]
        if rows != num_rows:
            raise ModelError(
                f"ContrastiveDivergence: the state holds {rows} persistent chains, one for each "
                f"row of the batch they began with, and this batch has {num_rows} rows. Keep "
                "`batch_size`, or start anew."
            )

    def advance(self, position: SiteValues, latest: Callable[[], jax.Array]) -> "Chains":
        """The chains one round later.

        :param dict position: where they are then.
        :param latest: a function that gives what is remembered of it, (rows, coordinates + 1).
        """
        count = self.num_rounds + 1
        due = count % SPACING == 0
        kept = lax.cond(
            due,
            lambda: latest().astype(self.history.dtype),
            lambda: jnp.zeros_like(self.history[0]),
        )
        place = jnp.where(due, (count // SPACING - 1) % HISTORY, HISTORY)
        return Chains(position, self.history.at[place].set(kept, mode="drop"), count)

    def remembered(self) -> np.ndarray:
        """The remembered rounds, in their order: (records, rows, coordinates + 1)."""
        records = int(self.num_rounds) // SPACING
        order = np.arange(max(0, records - HISTORY), records) % HISTORY
        return np.asarray(self.history)[order]

    def review(self) -> None:
        """Warn :class:`~numpyro_ebm.ConvergenceWarning` if the chains do not come around."""
        if int(self.num_rounds) < HISTORY * SPACING:
            return
        found = self.r_hat()
        worst = max(float(np.max(x)) for x in found.values())
        if worst < R_HAT_OF_STUCK_CHAINS:
            return
        visible = found["visible"]
        stuck = int(np.sum(visible >= R_HAT_OF_STUCK_CHAINS))
        warnings.warn(
            ConvergenceWarning(
                f"ContrastiveDivergence: over the last {HISTORY * SPACING} rounds R-hat of the "
                f"persistent chains is {worst:.3g} (energy {float(found['energy']):.3g}; "
                f"{stuck} of {visible.size} visible coordinates have {R_HAT_OF_STUCK_CHAINS:g} or "
                "more): each stays where it is, and the gradient is not that of the likelihood. "
                "Take more or longer steps of the kernel, lower the learning rate, or set "
                "`reset_probability`."
            ),
            stacklevel=find_stack_level(),
        )

    def r_hat(self) -> dict[str, np.ndarray]:
        """Split R-hat of the ``visible`` coordinates and the ``energy`` over remembered rounds.

        :raises ModelError: after fewer than 16 rounds.
        """
        count = int(self.num_rounds)
        if count < 4 * SPACING:
            raise ModelError(
                f"chain_diagnostics: needs at least {4 * SPACING} rounds, there were {count}."
            )
        r_hat = split_gelman_rubin(np.moveaxis(self.remembered(), 0, 1))  # chains, draws, ...
        return {"visible": r_hat[:-1], "energy": r_hat[-1]}
