# SPDX-License-Identifier: Apache-2.0
r"""Move particles of a guide towards the posterior by a few Langevin steps.

The bias of VaES and VaGES is bounded by the square root of KL(q ‖ p(h | v)). Steps of a Markov
chain that leaves the posterior invariant lower it for the same guide, at the price of one
evaluation of the energy and its gradient in h for each step.
"""

import blackjax
import jax
import jax.numpy as jnp
from jax import lax

from numpyro_ebm.errors import ModelError, check_integer, check_positive
from numpyro_ebm.model.row_model import RowModel
from numpyro_ebm.samplers import langevin
from numpyro_ebm.samplers.per_row import per_row
from numpyro_ebm.signatures import Checked
from numpyro_ebm.types import Params, SiteValues

__all__ = ["LangevinRefinement"]


class LangevinRefinement(Checked):
    r"""Langevin steps on continuous latent sites, for ``VaGES(refine=...)``.

    .. math:: h' = h + ε\,∇_h \log\tilde p(v, h; θ) + \sqrt{2ε}\,ξ

    every row of every particle being a chain of its own. Latents on other supports move in
    unconstrained coordinates.

    :param int num_steps: number of steps.
    :param float step_size: ε, in squared units of h.
    :param bool adjusted: whether a Metropolis-Hastings test follows each step (MALA), so that the
        posterior is invariant whatever ε; else the steps are unadjusted (ULA).
    :raises ModelError: if the arguments are not positive; when used, if a latent site is discrete.

    Reference: the refinement by SGLD of Bao et al., ICML 2021.

    **Example**

    >>> import numpyro_ebm as ebm
    >>> marginal = ebm.VaGES(2, refine=ebm.LangevinRefinement(num_steps=5, step_size=1e-2))
    """

    def __init__(self, num_steps: int = 5, step_size: float = 1e-2, *, adjusted: bool = False):
        check_integer("LangevinRefinement", num_steps=num_steps)
        check_positive("LangevinRefinement", step_size=step_size)
        self.num_steps = num_steps
        self.step_size = step_size
        self.adjusted = adjusted

    def __call__(
        self,
        rng_key: jax.Array,
        row_model: RowModel,
        params: Params,
        visible: SiteValues,
        latent: SiteValues,
    ) -> SiteValues:
        """Refine particles.

        :param rng_key: random key.
        :param RowModel row_model: the model.
        :param dict params: its parameters.
        :param dict visible: visible values.
        :param dict latent: latent values, particles leading.
        :return: refined latent values, particles leading.
        """
        for site in row_model.latent.values():
            if site.is_discrete:
                raise ModelError(
                    f"LangevinRefinement: the latent site '{site.name}' is discrete; Langevin "
                    "steps need continuous latents. Take "
                    "`KernelRefinement(BlockGibbs, num_steps)`."
                )
        algorithm = blackjax.mala if self.adjusted else langevin

        def refine_one(rng_key, latent):
            unconstrained = {k: row_model.latent[k].unconstrain_draw(h) for k, h in latent.items()}

            def log_density(rows):
                return row_model.unconstrained_log_density(
                    params, row_model.from_rows(rows), visible
                )

            kernel = jax.vmap(algorithm.build_kernel(), (0, 0, None, None))
            one_row = per_row(log_density)
            state = jax.vmap(lambda x: algorithm.init(x, one_row))(row_model.to_rows(unconstrained))

            def step(i, state):
                keys = jax.random.split(jax.random.fold_in(rng_key, i), row_model.num_rows)
                return kernel(keys, state, one_row, self.step_size)[0]

            state = lax.fori_loop(0, self.num_steps, step, state)
            return row_model.constrain(row_model.from_rows(state.position))[0]

        num_particles = jnp.shape(next(iter(latent.values())))[0]
        return jax.vmap(refine_one)(jax.random.split(rng_key, num_particles), latent)

    def __repr__(self):
        return (
            f"LangevinRefinement(num_steps={self.num_steps}, step_size={self.step_size}, "
            f"adjusted={self.adjusted})"
        )
