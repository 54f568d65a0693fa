# SPDX-License-Identifier: Apache-2.0
"""Training: NumPyro's ``SVI`` with an objective for the energy and a loss for the guide.

It may import :mod:`numpyro_ebm.objectives` and what it stands on.
"""

from numpyro_ebm.svi.checkpoints import Checkpoint
from numpyro_ebm.svi.energy_svi import EnergySVI
from numpyro_ebm.svi.files import load, save
from numpyro_ebm.svi.saved import SavedState
from numpyro_ebm.svi.state import EnergySVIRunResult, EnergySVIState

__all__ = [
    "Checkpoint",
    "EnergySVI",
    "EnergySVIRunResult",
    "EnergySVIState",
    "SavedState",
    "load",
    "save",
]
