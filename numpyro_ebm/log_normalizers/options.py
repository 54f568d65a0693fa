# SPDX-License-Identifier: Apache-2.0
"""The numbers that the methods for log Z take."""

from typing import NamedTuple

from jax.sharding import NamedSharding

from numpyro_ebm.errors import check_integer
from numpyro_ebm.program.devices import check_divides

__all__ = ["Options"]


class Options(NamedTuple):
    """Options of :func:`~numpyro_ebm.log_normalizer`; ``None`` for what depends on the method."""

    num_particles: int | None = None
    num_sweeps: int | None = None
    num_temperatures: int = 500
    num_replicates: int = 16
    max_states: int = 1_048_576
    sharding: NamedSharding | None = None

    def check(self) -> None:
        """Raise unless they are numbers that can be worked with."""
        least = dict(num_particles=2, num_sweeps=1, num_temperatures=1, num_replicates=2)
        for name, number in self._asdict().items():
            if name == "sharding" or number is None and name in ("num_particles", "num_sweeps"):
                continue
            check_integer("log_normalizer", least.get(name, 1), **{name: number})
        if self.num_particles is not None:
            check_divides("log_normalizer", self.sharding, particles=self.num_particles)
