# SPDX-License-Identifier: Apache-2.0
"""The chains of persistent contrastive divergence, and which of them move in a round."""

import warnings
from typing import NamedTuple

import jax
import numpy as np

from numpyro_ebm._compat import find_stack_level
from numpyro_ebm.errors import ConvergenceWarning, ModelError
from numpyro_ebm.objectives.chain_history import RECORDS, History
from numpyro_ebm.objectives.plan import BatchRows, Problem
from numpyro_ebm.types import SiteValues

__all__ = ["Chains", "rows_of_batch"]

R_HAT_OF_STUCK_CHAINS = 3.0
"""R-hat over the remembered rounds above which a run warns: the chains have hardly moved."""


class Chains(NamedTuple):
    """Persistent chains.

    - **position** - unconstrained values of the sites that the kernel moves, by name, one chain a
      row, rows leading.
    - **num_rounds** - rounds so far.
    - **history** - what is remembered of them, or ``None``.
    - **log_weights** - of weighted chains, (chains,).
    - **begun** - of chains that belong to rows of the data each, whether the row has been in a
      batch, (chains,).
    """

    position: SiteValues
    num_rounds: jax.Array
    history: History | None = None
    log_weights: jax.Array | None = None
    begun: jax.Array | None = None

    @property
    def num_chains(self) -> int:
        """How many there are."""
        return len(jax.tree.leaves(self.position)[0])

    def check(self, expected: int, each: bool) -> None:
        """Raise unless there are as many as expected.

        :param int expected: how many.
        :param bool each: whether that is one for each row of the batch.
        """
        found = self.num_chains
        if found == expected:
            return
        if each:
            raise ModelError(
                f"ContrastiveDivergence: the state holds {found} persistent chains, one for each "
                f"row of the batch they began with, and this batch has {expected} rows. Keep "
                "`batch_size`, or start anew."
            )
        raise ModelError(
            f"ContrastiveDivergence: the state holds {found} persistent chains, and there should "
            f"be {expected}. Keep `num_chains`, `buffer` and the rows of the data, or start anew."
        )

    def taken(self, index: jax.Array | None) -> SiteValues:
        """Positions of some chains; of all if ``index`` is ``None``."""
        return self.position if index is None else {k: x[index] for k, x in self.position.items()}

    def put(self, index: jax.Array | None, chains: SiteValues) -> "Chains":
        """The chains a round later, with those of :meth:`taken` moved."""
        position, begun = chains, self.begun
        if index is not None:
            position = {k: x.at[index].set(chains[k]) for k, x in self.position.items()}
            begun = None if begun is None else begun.at[index].set(True)
        return self._replace(position=position, num_rounds=self.num_rounds + 1, begun=begun)

    def remembered(self) -> dict[str, np.ndarray]:
        """What the history holds, in its order, arrays of shape (records, chains, ...)."""
        return {} if self.history is None else self.history.remembered(self.num_rounds)

    def review(self) -> None:
        """Warn :class:`~numpyro_ebm.ConvergenceWarning` if the chains do not come around."""
        history = self.history
        if history is None or history.num_records(self.num_rounds) < RECORDS:
            return
        found = history.r_hat(self.num_rounds)
        energy = float(found.pop("energy"))
        ((name, r_hat),) = found.items()
        worst = max(energy, float(np.max(r_hat)))
        if worst < R_HAT_OF_STUCK_CHAINS:
            return
        what = {"visible": "visible coordinates", "projections": "projections of them"}[name]
        stuck = int(np.sum(r_hat >= R_HAT_OF_STUCK_CHAINS))
        warnings.warn(
            ConvergenceWarning(
                f"ContrastiveDivergence: over the last {RECORDS * int(history.spacing)} rounds "
                f"R-hat of the persistent chains is {worst:.3g} (energy {energy:.3g}; "
                f"{stuck} of {r_hat.size} {what} have {R_HAT_OF_STUCK_CHAINS:g} or "
                "more): each stays where it is, and the gradient is not that of the likelihood. "
                "Take more or longer steps of the kernel, lower the learning rate, or set "
                "`reset_probability`."
            ),
            stacklevel=find_stack_level(),
        )


def rows_of_batch(problem: Problem) -> BatchRows:
    """Which rows of the data the batch has; raises ModelError if nobody knows."""
    row_model = problem.row_model
    if row_model.total_rows != row_model.num_rows:  # the plate subsamples itself
        return BatchRows(row_model.plates[row_model.plate], row_model.total_rows)
    if problem.rows is None:
        raise ModelError(
            "ContrastiveDivergence: every row has a density of its own, because its energy reads "
            f"what differs from row to row: {', '.join(row_model.covariates)}. A persistent chain "
            "then belongs to one row of the data, and only `EnergySVI.run` on arrays tells which "
            "rows a batch has. Use it, or `persistent=False`."
        )
    return problem.rows
