# SPDX-License-Identifier: Apache-2.0
"""Training: NumPyro's ``SVI`` with an objective for the energy and a loss for the guide.

It may import :mod:`numpyro_ebm.objectives` and what it stands on.
"""

from numpyro_ebm.svi.energy_svi import EnergySVI
from numpyro_ebm.svi.files import SavedState, load, save
from numpyro_ebm.svi.state import EnergySVIRunResult, EnergySVIState

__all__ = ["EnergySVI", "EnergySVIRunResult", "EnergySVIState", "SavedState", "load", "save"]
