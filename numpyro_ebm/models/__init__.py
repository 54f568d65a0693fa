# SPDX-License-Identifier: Apache-2.0
"""Ready NumPyro models, and networks on images to make them of (extra ``networks``)."""

from numpyro_ebm.models.conditional_energy import conditional_energy
from numpyro_ebm.models.deep_eblvm import deep_eblvm, deep_eblvm_guide
from numpyro_ebm.models.grbm import grbm, grbm_guide, grbm_log_likelihood, grbm_log_normalizer
from numpyro_ebm.models.image_networks import conv_network, mlp_network, residual_network
from numpyro_ebm.models.jem import jem, jem_logits
from numpyro_ebm.models.latent_prior import latent_prior
from numpyro_ebm.models.neural_energy import neural_energy
from numpyro_ebm.models.noise_conditional import noise_conditional_energy

__all__ = [
    "conditional_energy",
    "conv_network",
    "deep_eblvm",
    "deep_eblvm_guide",
    "grbm",
    "grbm_guide",
    "grbm_log_likelihood",
    "grbm_log_normalizer",
    "jem",
    "jem_logits",
    "latent_prior",
    "mlp_network",
    "neural_energy",
    "noise_conditional_energy",
    "residual_network",
]
