# SPDX-License-Identifier: Apache-2.0
"""Every kernel for MCMC, once: what the laws over all kernels have to know of it."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpyro

import numpyro_ebm as ebm


class Kernel(NamedTuple):
    """A kernel. Which laws it has to obey, the kernel says itself (``leaves_invariant``, ...).

    - **make** - model, options -> kernel.
    - **step_size** - a coarse one, where the rows start with exact draws. For continuous sites.
    - **laws** - which laws of discrete sites it is tried on, by name.
    - **num_steps** - after how many steps it has forgotten there where it started.
    """

    make: Callable
    step_size: float | None = None
    laws: tuple = ()
    num_steps: int = 0


TEMPERATURES = {"inverse_temperatures": [0.3, 1.0], "num_steps": 5, "step_size": 0.1}

KERNELS = {
    "MALA": Kernel(ebm.MALA, 1.0),
    "MALA-mass": Kernel(partial(ebm.MALA, adapt_mass_matrix=True), 1.0),
    "UnderdampedLangevin": Kernel(ebm.UnderdampedLangevin, 1.2),
    "MCLMC": Kernel(ebm.MCLMC, 2.0),
    "ReplicaExchange": Kernel(partial(ebm.ReplicaExchange, num_replicas=3), 1.0),
    "ULA": Kernel(partial(ebm.ULA, step_size=0.05)),
    "MCLMC-unadjusted": Kernel(partial(ebm.MCLMC, adjusted=False)),
    "AnnealedLangevin": Kernel(partial(ebm.AnnealedLangevin, **TEMPERATURES)),
    "BlockGibbs": Kernel(
        ebm.BlockGibbs, laws=("lattice", "dense", "potts", "ordinal"), num_steps=20
    ),
    "DiscreteLangevin": Kernel(
        ebm.DiscreteLangevin, laws=("lattice", "dense", "ordinal"), num_steps=100
    ),
    "exact differences": Kernel(
        partial(ebm.DiscreteLangevin, differences="exact"), laws=("dense", "potts"), num_steps=80
    ),
    "SwendsenWang": Kernel(ebm.SwendsenWang, laws=("lattice", "dense"), num_steps=30),
    "DULA": Kernel(partial(ebm.DiscreteLangevin, step_size=0.5, adjusted=False)),
}


def nothing():
    with numpyro.plate("data", 1):
        numpyro.sample("x", ebm.Lebesgue())


def kernels(**attributes):
    """The kernels with these attributes, such as ``moves_discrete=True``."""
    found = {}
    for name, kernel in KERNELS.items():
        made = kernel.make(ebm.fixed(nothing, {}))
        if all(getattr(made, key) == value for key, value in attributes.items()):
            found[name] = kernel
    return found
