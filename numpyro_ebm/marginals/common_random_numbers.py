# SPDX-License-Identifier: Apache-2.0
r"""A marginal that is one function of θ: importance sampling with common random numbers.

.. math:: \log\hat p(v; θ) = \log\frac1L \sum_{i=1}^L \frac{\tilde p(v, h_i; θ)}{q(h_i | v)}

with the same particles whatever θ is. Everything an objective computes from it (its value, its
derivatives in θ) then belongs to one deterministic function, as Hamiltonian Monte Carlo needs; its
derivatives are those of self-normalised VaES and VaGES, consistent as L grows.
"""

from jax.lax import stop_gradient

from numpyro_ebm.marginals.base import Estimate, Marginal, score_of
from numpyro_ebm.marginals.importance_bound import weighted_mean

__all__ = ["CommonRandomNumbers"]


class CommonRandomNumbers(Marginal):
    """Importance-weighted log p̃(v; θ) at fixed particles of a guide.

    :param int num_particles: L.
    """

    needs_guide = True
    value = "exact"  # of the function that it is
    corrects_guide = True

    def __init__(self, num_particles):
        self.num_particles = num_particles

    def check(self, row_model, guide, order):
        pass  # what stands for it, `VaGES`, has been checked

    def bind(self, rng_key, row_model, guide, params, unconstrained, *, order=2):
        visible, _ = row_model.constrain(stop_gradient(unconstrained))
        constants = stop_gradient(params)
        density = weighted_mean(rng_key, row_model, guide, constants, visible, self.num_particles)
        return Estimate(density, score_of(density, params))
