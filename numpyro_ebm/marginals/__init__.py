# SPDX-License-Identifier: Apache-2.0
"""Ways to integrate the latent sites out, and which exact one covers a model.

It may import :mod:`numpyro_ebm.guides`, :mod:`numpyro_ebm.model` and the floors below. Whatever
sums or integrates latent sites out exactly asks :func:`exact_marginal`: objectives, kernels and
``sample``, log Z and log-likelihoods, posteriors and diagnostics. ``__all__`` is what
:mod:`numpyro_ebm` gives and the manual lists.
"""

from numpyro_ebm.errors import ModelError
from numpyro_ebm.marginals.base import Estimate as Estimate
from numpyro_ebm.marginals.base import ExactMarginal
from numpyro_ebm.marginals.base import Marginal as Marginal
from numpyro_ebm.marginals.enumerated import Enumerated
from numpyro_ebm.marginals.exact import Exact
from numpyro_ebm.marginals.gaussian_latents import GaussianLatents
from numpyro_ebm.marginals.importance_bound import ImportanceBound
from numpyro_ebm.marginals.kernel_refinement import KernelRefinement
from numpyro_ebm.marginals.langevin_refinement import LangevinRefinement
from numpyro_ebm.marginals.persistent_particles import PersistentParticles
from numpyro_ebm.marginals.unrolled import Unrolled
from numpyro_ebm.marginals.vages import VaGES
from numpyro_ebm.model.row_model import RowModel

__all__ = [
    "Enumerated",
    "Exact",
    "GaussianLatents",
    "ImportanceBound",
    "KernelRefinement",
    "LangevinRefinement",
    "PersistentParticles",
    "Unrolled",
    "VaGES",
]

EXACT = {"none": (Exact(),), "discrete": (Enumerated(),), "real": (GaussianLatents(),)}
"""The exact marginals by the latent sites they are for: none, discrete ones alone, or real ones
with or without discrete ones beside them. The first that covers a model serves."""


def exact_marginal(row_model: RowModel) -> ExactMarginal:
    """The exact marginal that covers the latent sites of a model.

    :param RowModel row_model: the model.
    :return: an :class:`~numpyro_ebm.marginals.base.ExactMarginal`.
    :raises ModelError: if there is none; the message says why.

    **Example**

    >>> import jax.numpy as jnp
    >>> import numpyro_ebm as ebm
    >>> from numpyro_ebm.marginals import exact_marginal
    >>> from numpyro_ebm.model.reading import read_model
    >>> exact_marginal(read_model(ebm.models.grbm, (jnp.zeros((3, 2)),)))
    Enumerated(max_states=65536)
    """
    latent = row_model.latent
    kind = "none"
    if latent:
        kind = "discrete" if all(site.is_discrete for site in latent.values()) else "real"
    reasons = []
    for marginal in EXACT[kind]:
        try:
            marginal.check(row_model, None, 1)
        except ModelError as error:
            reasons.append(str(error))
        else:
            return marginal
    raise ModelError(
        f"No exact marginal covers the latent site(s) {', '.join(map(repr, latent))}. "
        + " ".join(reasons)
    )


def list_exact() -> str:
    """The exact marginals, as a message names them."""
    *names, last = [f"`{type(x).__name__}()`" for x in sum(EXACT.values(), ())]
    return f"{', '.join(names)} or {last}"


def integrable(row_model: RowModel, max_coordinates: int) -> list[str]:
    """The latent sites of a model, and the real visible ones that can be integrated out with them.

    Tried one by one, the largest first. One visible site at least remains.

    :param RowModel row_model: the model.
    :param int max_coordinates: the most coordinates of a real site in a row.
    :return: list of names, for ``row_model.with_latent(names)``.
    """
    names = list(row_model.latent)
    sizes = {
        name: size
        for name, size in row_model.sizes.items()
        if row_model.visible[name].is_real and size <= max_coordinates
    }
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        if len(names) + 1 < len(row_model.sites):
            try:
                exact_marginal(row_model.with_latent([*names, name]))
            except ModelError:
                continue
            names.append(name)
    return names


def choose(row_model: RowModel) -> ExactMarginal:
    """The default marginal of a model: exact if there is one, else the user has to choose.

    :raises ModelError: if the model has latent sites that no exact marginal covers.
    """
    try:
        return exact_marginal(row_model)
    except ModelError as error:
        raise ModelError(
            f"{error} Pass `marginal=VaGES(num_particles=2)` with a guide q(h | v)."
        ) from None
