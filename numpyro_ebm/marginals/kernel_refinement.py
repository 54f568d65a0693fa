# SPDX-License-Identifier: Apache-2.0
"""Move particles of a guide towards the posterior by some steps of any kernel.

Steps that leave the posterior invariant lower KL(q ‖ p(h | v)), and the bias of VaES and VaGES with
it, whatever the latents are: Gibbs sweeps through the layers of a deep Boltzmann machine that start
at its mean field, for one.
"""

from collections.abc import Callable

import jax
from numpyro.infer.mcmc import MCMCKernel

from numpyro_ebm.errors import check_integer
from numpyro_ebm.marginals.kernel_steps import check_kernel_maker, constrain_latents, move_latents
from numpyro_ebm.model.row_model import RowModel
from numpyro_ebm.signatures import Checked
from numpyro_ebm.types import Params, SiteValues

__all__ = ["KernelRefinement"]


class KernelRefinement(Checked):
    r"""Steps of a kernel on all latent sites, for ``VaGES(refine=...)``.

    .. math:: h_0 \sim q(\cdot \mid v), \qquad h_{t+1} \sim K_θ(h_t, \cdot \mid v)

    at the visible values that the objective uses, noised ones for denoising. Every row of every
    particle is a chain of its own with the kernels of this library. For continuous latents alone
    :class:`~numpyro_ebm.LangevinRefinement` is lighter.

    :param kernel: a function of a model that returns a NumPyro ``MCMCKernel``, such as
        :class:`~numpyro_ebm.BlockGibbs`. There is no warm-up, so that a Langevin kernel needs its
        step size.
    :param int num_steps: steps of the kernel.
    :raises ModelError: if ``kernel`` is no such function, or ``num_steps`` not positive; when used,
        if the kernel sums latent sites out.

    Reference: the refinement of particles of Bao et al., ICML 2021; Gibbs sweeps from the mean
    field, Salakhutdinov, Larochelle, *Efficient learning of deep Boltzmann machines*, AISTATS 2010.

    **Example**

    >>> import numpyro_ebm as ebm
    >>> marginal = ebm.VaGES(2, refine=ebm.KernelRefinement(ebm.BlockGibbs, 3))
    """

    def __init__(self, kernel: Callable[..., MCMCKernel], num_steps: int = 1):
        check_kernel_maker("KernelRefinement", kernel)
        check_integer("KernelRefinement", num_steps=num_steps)
        self.kernel = kernel
        self.num_steps = num_steps

    def __call__(
        self,
        rng_key: jax.Array,
        row_model: RowModel,
        params: Params,
        visible: SiteValues,
        latent: SiteValues,
    ) -> SiteValues:
        """Refine particles.

        The arguments are those of :class:`~numpyro_ebm.LangevinRefinement`.
        """
        sites, num = row_model.latent, len(next(iter(latent.values())))
        start = {name: sites[name].unconstrain_draw(x) for name, x in latent.items()}

        def refine_one(key, start):
            return move_latents(
                "KernelRefinement",
                self.kernel,
                key,
                row_model,
                params,
                start,
                self.num_steps,
                visible=visible,
            )

        moved = jax.vmap(refine_one)(jax.random.split(rng_key, num), start)
        return constrain_latents(row_model, moved)

    def __repr__(self):
        return f"KernelRefinement({self.kernel!r}, num_steps={self.num_steps})"
