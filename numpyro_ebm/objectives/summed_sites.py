# SPDX-License-Identifier: Apache-2.0
r"""Visible sites that a kernel sums or integrates out, drawn beside what it moved.

.. math:: v_1 \sim K(\cdot), \qquad (v_2, h) \sim p(v_2, h \mid v_1; θ)

A kernel on the exact marginal of some sites leaves p(v₁) invariant; the others, drawn from their
exact conditional, make it a draw of the joint. :func:`~numpyro_ebm.sample` does the same.
"""

import jax

from numpyro_ebm.errors import ModelError
from numpyro_ebm.marginals import exact_marginal
from numpyro_ebm.model.row_model import RowModel
from numpyro_ebm.types import Params, SiteValues

__all__ = ["draw_summed_sites"]


def draw_summed_sites(
    rng_key: jax.Array, kernel: str, row_model: RowModel, params: Params, position: SiteValues
) -> SiteValues:
    """Unconstrained values of the visible sites that a kernel has no values of, by name.

    :param rng_key: random key.
    :param str kernel: name of the kernel, for the error.
    :param RowModel row_model: the model.
    :param dict params: parameter values by name.
    :param dict position: unconstrained values of the sites that the kernel moved.
    :raises ModelError: if no exact marginal covers the sites that it did not move.
    """
    unmoved = [name for name in row_model.sites if name not in position]
    missing = sorted(row_model.visible.keys() & set(unmoved))
    if not missing:
        return {}
    rest = row_model.with_latent(unmoved)
    try:
        marginal = exact_marginal(rest)
    except ModelError as error:
        raise ModelError(
            f"ContrastiveDivergence: {kernel} moves {sorted(position)} and draws no values of the "
            f"visible site(s) {missing} to compare with the data, and they have no exact "
            "conditional that is known. Draw them in a block of their own: "
            f"`lambda model: numpyro.infer.Gibbs([({kernel}(model, ...), {sorted(position)}), "
            f"(BlockGibbs(model), {missing})])`. ({error})"
        ) from None
    moved, _ = row_model.constrain({name: position[name] for name in rest.visible})
    draws = marginal.draw(rng_key, rest, params, jax.tree.map(lambda x: x[None], moved), 1)
    return {name: row_model.visible[name].unconstrain_draw(draws[name][0]) for name in missing}
