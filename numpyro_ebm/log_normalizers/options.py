# SPDX-License-Identifier: Apache-2.0
"""The numbers that the methods for log Z take."""

from typing import NamedTuple

import jax
from jax.sharding import NamedSharding

from numpyro_ebm.errors import check_integer
from numpyro_ebm.program.compilation import is_traced
from numpyro_ebm.program.devices import check_divides
from numpyro_ebm.program.progress import Progress

__all__ = ["Options"]


class Options(NamedTuple):
    """Options of :func:`~numpyro_ebm.log_normalizer`; ``None`` for what depends on the method."""

    num_particles: int | None = None
    num_sweeps: int | None = None
    num_temperatures: int = 500
    num_replicates: int = 16
    max_states: int = 1_048_576
    sharding: NamedSharding | None = None
    progress_bar: bool = False

    def progress(self, method: str, rng_key: jax.Array) -> Progress:
        """A bar of what is annealed; none where particles are spread over devices."""
        shown = self.progress_bar and self.sharding is None and not is_traced(rng_key)
        return Progress(f"log_normalizer ({method})", shown=shown)

    def check(self) -> None:
        """Raise unless they are numbers that can be worked with."""
        least = dict(num_particles=2, num_sweeps=1, num_temperatures=1, num_replicates=2)
        for name, number in self._asdict().items():
            if name in ("sharding", "progress_bar"):
                continue
            if number is None and name in ("num_particles", "num_sweeps"):
                continue
            check_integer("log_normalizer", least.get(name, 1), **{name: number})
        if self.num_particles is not None:
            check_divides("log_normalizer", self.sharding, particles=self.num_particles)
