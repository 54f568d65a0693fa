# SPDX-License-Identifier: Apache-2.0
r"""What is remembered of persistent chains from round to round, and the R-hat of it.

R-hat compares the means of the chains over the remembered rounds with the spread within each. Of
many coordinates v it takes fixed random projections,

.. math:: y_k = \sum_i a_{ki} v_i, \qquad a_{ki} \sim N(0, 1/d)

since chains that stay apart in any direction of their coordinates stay apart in almost all of these
as well, and a history of all coordinates would be larger than the data.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from numpyro.diagnostics import split_gelman_rubin

from numpyro_ebm.errors import ModelError
from numpyro_ebm.keys import default_key

__all__ = ["RECORDS", "SPACING", "History", "Remembers"]

Remembers: TypeAlias = Literal["light", "full"] | None

RECORDS, SPACING = 64, 4
"""Records that are kept, and how often a chain moves between two of them."""

PROJECTIONS, CHAINS = 16, 256
"""The most numbers of a chain, and the most chains, that a light history has."""


class History(NamedTuple):
    """Rings of records, one a few rounds.

    - **rings** - dict of arrays (64, chains, ...): the ``energy`` and, unconstrained, all
      coordinates of the ``visible`` sites, or ``projections`` of them.
    - **spacing** - rounds between two records.
    """

    rings: dict[str, jax.Array]
    spacing: jax.Array

    @classmethod
    def start(
        cls, kind: Remembers, num_chains: int, num_coordinates: int, share: float = 1.0
    ) -> "History | None":
        """An empty one.

        :param kind: ``"full"``, all visible coordinates of all chains; ``"light"``, up to 16
            numbers of the first 256; ``None``, none.
        :param int num_chains: number of chains.
        :param int num_coordinates: number of visible coordinates of a chain.
        :param float share: share of the chains that moves in a round.
        """
        if kind is None:
            return None
        few = kind == "full" or num_coordinates <= PROJECTIONS
        chains = num_chains if kind == "full" else min(num_chains, CHAINS)
        name, size = ("visible", num_coordinates) if few else ("projections", PROJECTIONS)
        rings = {
            "energy": jnp.zeros((RECORDS, chains)),
            name: jnp.zeros((RECORDS, chains, size)),
        }
        return cls(rings, jnp.array(round(SPACING / share)))

    @property
    def num_chains(self) -> int:
        """How many chains are remembered, the first ones."""
        return self.rings["energy"].shape[1]

    def record(
        self, num_rounds: jax.Array, latest: Callable[[], tuple[jax.Array, jax.Array]]
    ) -> "History":
        """The history after so many rounds.

        :param num_rounds: rounds so far.
        :param latest: gives the visible coordinates of the remembered chains after them, (chains,
            coordinates), and their energies, (chains,).
        """
        due = num_rounds % self.spacing == 0

        def look():
            coordinates, energy = latest()
            found = {"energy": energy, "visible": coordinates}
            if "projections" in self.rings:
                found["projections"] = coordinates @ _directions(coordinates.shape[1])
            return {name: found[name].astype(ring.dtype) for name, ring in self.rings.items()}

        kept = lax.cond(due, look, lambda: jax.tree.map(lambda x: jnp.zeros_like(x[0]), self.rings))
        place = jnp.where(due, (num_rounds // self.spacing - 1) % RECORDS, RECORDS)
        rings = jax.tree.map(lambda x, new: x.at[place].set(new, mode="drop"), self.rings, kept)
        return self._replace(rings=rings)

    def num_records(self, num_rounds: jax.Array) -> int:
        """How many records were made in so many rounds, those overwritten included."""
        return int(num_rounds) // int(self.spacing)

    def remembered(self, num_rounds: jax.Array) -> dict[str, np.ndarray]:
        """The records in their order, arrays of shape (records, chains, ...)."""
        records = self.num_records(num_rounds)
        order = np.arange(max(0, records - RECORDS), records) % RECORDS
        return {name: np.asarray(ring)[order] for name, ring in self.rings.items()}

    def r_hat(self, num_rounds: jax.Array) -> dict[str, np.ndarray]:
        """Split R-hat of all that is remembered.

        :raises ModelError: with fewer than 4 records.
        """
        if self.num_records(num_rounds) < 4:
            raise ModelError(
                f"chain_diagnostics: needs at least {4 * int(self.spacing)} rounds, there were "
                f"{int(num_rounds)}."
            )
        rounds = self.remembered(num_rounds)
        return {k: split_gelman_rubin(np.swapaxes(x, 0, 1)) for k, x in rounds.items()}


def _directions(num_coordinates):
    """The projections, (coordinates, 16): the same in every round, run and process."""
    shape = num_coordinates, PROJECTIONS
    return jax.random.normal(default_key(), shape) / jnp.sqrt(num_coordinates)
