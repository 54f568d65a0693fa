# SPDX-License-Identifier: Apache-2.0
"""A look at the chains while NumPyro's ``MCMC`` runs them, which tells a kernel nothing of its end.

At the end of the warm-up and 25, 100, 400, ... steps later the energies and the sums of coordinates
of all rows come to the host, where they are compared with those of the look before. At all other
steps nothing happens.
"""

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from numpyro_ebm.errors import ConvergenceWarning
from numpyro_ebm.mcmc.convergence import LARGEST_ERROR, MANY_FROZEN

__all__ = ["Watch"]

TIMES = (0, *(25 * 4**k for k in range(12)))
"""Steps after the warm-up at which the chains are looked at."""

LONG_ENOUGH = 75
"""Steps in which every row has to move."""

MANY_ENERGIES = 20


class Watch:
    """The looks at one run of a kernel.

    :param str owner: the name of the kernel.
    :param int num_warmup: length of its warm-up.
    :param bool moves: whether a row that stays where it is has been rejected.
    :param str unit: what moves by itself: "rows", or "chains" of a model without rows.
    """

    def __init__(self, owner: str, num_warmup: int, moves: bool, unit: str = "rows"):
        self.owner, self.num_warmup, self.moves, self.unit = owner, num_warmup, moves, unit
        self.last: tuple[int, NDArray[Any], NDArray[Any], float] | None = None

    def after(self, state: Any, sums: Callable[[], jax.Array]) -> None:
        """Look at a state of one chain, or of many, if it is time; may be traced.

        :param sums: gives the sums of the coordinates of every row, like the energies.
        """
        t = jnp.ravel(state.i)[0] - self.num_warmup
        jax.lax.cond(
            jnp.any(t == jnp.array(TIMES)),
            lambda: jax.debug.callback(
                self._look,
                t,
                state.potential_energy,
                sums(),
                jnp.max(jnp.stack([jnp.max(jnp.abs(x)) for x in state.z.values()])),
            ),
            lambda: None,
        )

    def _look(self, t, energy, sums, largest):
        eps = np.finfo(np.asarray(energy).dtype).eps
        t, energy, largest = int(t), np.asarray(energy, float), float(largest)
        if t not in TIMES:  # under a `vmap` of the user's every step comes here
            return
        shape = (-1, energy.shape[-1]) if self.unit == "rows" else (1, -1)  # (chains, rows)
        energy, sums = energy.reshape(shape), np.asarray(sums).reshape(shape)
        said = self._compare(t, energy, sums, largest, eps)
        self.last = t, energy, sums, largest
        if said:
            warnings.warn(
                ConvergenceWarning(
                    f"{self.owner}: {said}, {t} steps after the warm-up. Look at the draws before "
                    "you use them: take more warm-up steps or start elsewhere (`init_params`); "
                    "without a Metropolis test, take smaller steps. Where values grow without end, "
                    "exp(-E) has no integral."
                ),
                stacklevel=2,
            )

    def _compare(self, t, energy, sums, largest, eps):
        bad = ~np.isfinite(energy)
        if bad.any():
            return f"the energy is not finite in {bad.any(0).sum()} of {bad.shape[1]} {self.unit}"
        large = np.abs(energy) * eps > LARGEST_ERROR
        if large.any():
            return (
                f"the energies of {large.any(0).sum()} of {large.shape[1]} {self.unit} are so "
                f"large, {np.abs(energy).max():.3g}, that floats know them to {LARGEST_ERROR:g} "
                f"nats or worse (the largest unconstrained value is {largest:.3g})"
            )
        if self.last is None or t <= self.last[0] or self.last[1].shape != energy.shape:
            return ""
        before, old, old_sums, old_largest = self.last
        frozen = (sums == old_sums).mean(0) > MANY_FROZEN
        if self.moves and t - before >= LONG_ENOUGH and frozen.any():
            what = f"{frozen.sum()} of {len(frozen)} {self.unit}"
            return f"{what} did not move in {t - before} steps"
        falls = energy.size >= MANY_ENERGIES and (energy < old).mean() > 0.95
        if falls and np.median(old - energy) > 1:
            return (
                f"the energies still fall, by {np.median(old - energy):.3g} nats in the last "
                f"{t - before} steps (the largest unconstrained value is {largest:.3g})"
            )
        if largest > 10 * max(old_largest, 100):
            return f"the largest unconstrained value grew from {old_largest:.3g} to {largest:.3g}"
        return ""
