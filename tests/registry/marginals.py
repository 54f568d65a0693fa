# SPDX-License-Identifier: Apache-2.0
"""Every marginal, once: what the laws over all marginals have to know of it."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import oracles

import numpyro_ebm as ebm


class Marginal(NamedTuple):
    """A marginal.

    - **make** - () -> marginal.
    - **system** - options -> the system on which it is exact, or unbiased as its guide is the
      posterior; ``None`` where it is so in a limit only, which has a test of its own.
    - **order** - the highest derivative of log p̃ that is then unbiased.
    - **under_objectives** - whether objectives are tried on it too.
    """

    make: Callable
    system: Callable | None
    order: int = 3
    under_objectives: bool = True


def _plated_system():
    return oracles.grbm_system(model=oracles.grbm_plated, hidden_plate=True)


def _vages(
    num_particles, system=oracles.grbm_system, *, order=3, under_objectives=False, **options
):
    make = partial(ebm.VaGES, num_particles, **options)
    return Marginal(make, system, order, under_objectives)


MARGINALS = {
    "Exact": Marginal(ebm.Exact, oracles.gaussian_system),
    "Enumerated": Marginal(ebm.Enumerated, oracles.grbm_system),
    "GaussianLatents": Marginal(ebm.GaussianLatents, oracles.linear_system),
    "VaGES": _vages(3, under_objectives=True),
    "VaGES, 2 particles": _vages(2, order=2),
    "VaGES, 4 particles": _vages(4),
    "VaGES, hidden plate": _vages(2, _plated_system, order=2),
    "VaGES, continuous": _vages(4, oracles.linear_system, under_objectives=True),
    "VaGES, weighted": _vages(3, importance_weighted=True, under_objectives=True),
    "VaGES, weighted, continuous": _vages(3, oracles.linear_system, importance_weighted=True),
    "VaGES, refined": _vages(
        3,
        oracles.linear_system,
        refine=ebm.LangevinRefinement(2, 0.1, adjusted=True),
        under_objectives=True,
    ),
    "ImportanceBound": Marginal(partial(ebm.ImportanceBound, 3), None),
    "Unrolled": Marginal(partial(ebm.Unrolled, 2), None),
    "PersistentParticles": Marginal(partial(ebm.PersistentParticles, ebm.BlockGibbs, 2), None),
}
