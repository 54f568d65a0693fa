# SPDX-License-Identifier: Apache-2.0
"""Initial values of a chain: those of a strategy, and those that are given.

Rows at which the energy is not finite, behind a hard wall for one, are drawn anew, as NumPyro does
it for NUTS.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from numpyro.handlers import seed, substitute, trace

from numpyro_ebm._compat import GIBBS_SITES_KWARG
from numpyro_ebm.errors import ModelError
from numpyro_ebm.model.plain_model import PlainModel
from numpyro_ebm.model.row_model import RowModel
from numpyro_ebm.types import Params, SiteValues

__all__ = ["MAX_DRAWS", "initial_values", "redrawn", "unconstrained_values"]

MAX_DRAWS = 100
"""How often the initial values of a row are drawn until its energy is finite."""


def initial_values(
    rng_key: jax.Array,
    row_model: RowModel,
    init_strategy: Callable[..., Any],
    init_params: Params | None,
) -> SiteValues:
    """Initial values of all unobserved sites, on their supports.

    :raises ModelError: if values are given of what is no unobserved site, or of another shape.
    """
    values = _values_of_strategy(rng_key, row_model, init_strategy)
    z = {name: jnp.asarray(values[name]) for name in row_model.sites}
    for name, x in (init_params or {}).items():
        if name not in z or jnp.shape(x) != z[name].shape:
            shapes = {k: v.shape for k, v in z.items()}
            raise ModelError(
                f"`init_params` has '{name}' of shape {jnp.shape(x)}; the unobserved sites "
                f"and their shapes are {shapes}."
            )
        z[name] = jnp.asarray(x, z[name].dtype)
    return z


def unconstrained_values(
    rng_key: jax.Array,
    row_model: RowModel | PlainModel,
    init_strategy: Callable[..., Any],
    init_params: Params | None,
) -> SiteValues:
    """Initial unconstrained values of the real sites.

    :raises ModelError: if values are given of what is no unobserved site, or of another shape.
    """
    if isinstance(row_model, PlainModel):
        return row_model.start(rng_key, init_strategy, init_params)
    values = _values_of_strategy(rng_key, row_model, init_strategy)
    z = {name: site.unconstrain_draw(values[name]) for name, site in row_model.visible.items()}
    if init_params is None:
        return z
    unknown = sorted(set(init_params) - set(row_model.sites))
    if unknown:
        raise ModelError(
            f"`init_params` names {unknown}, which are not unobserved sites of the kernel's model. "
            "For a kernel on part of the sites do not hide the others by `block`: move them in "
            "blocks of `numpyro.infer.Gibbs`, or integrate real ones out, "
            f"`numpyro_ebm.integrated(model, {unknown})`."
        )
    given = {k: jnp.asarray(x) for k, x in init_params.items() if k in row_model.visible}
    if GIBBS_SITES_KWARG in row_model.kwargs:  # Gibbs hands over constrained values
        given = {k: row_model.visible[k].transform.inv(x) for k, x in given.items()}
    for name, x in given.items():
        if x.shape != z[name].shape:
            raise ModelError(
                f"`init_params` gives '{name}' the shape {x.shape}, and in unconstrained "
                f"coordinates it has {z[name].shape}, with the chains leading if there are several."
            )
    return {**z, **{k: x.astype(z[k].dtype) for k, x in given.items()}}


def redrawn(
    rng_key: jax.Array,
    row_model: RowModel,
    draw: Callable[[jax.Array], SiteValues],
    is_finite: Callable[[SiteValues], jax.Array],
) -> SiteValues:
    """Initial values whose bad rows are drawn anew, at most :data:`MAX_DRAWS` times.

    :param draw: random key -> initial values of all rows.
    :param is_finite: initial values -> whether a row can start there, (rows,).
    """

    def goes_on(carry):
        _, _, finite, count = carry
        return ~jnp.all(finite) & (count < MAX_DRAWS)

    def again(carry):
        key, z, finite, count = carry
        key, key_draw = jax.random.split(key)
        fresh = draw(key_draw)
        z = {k: jnp.where(row_model.rows_like(finite, k, x), x, fresh[k]) for k, x in z.items()}
        return key, z, is_finite(z), count + 1

    nothing = jnp.zeros(row_model.num_rows, bool)
    return jax.lax.while_loop(goes_on, again, (rng_key, draw(rng_key), nothing, jnp.array(0)))[1]


def _values_of_strategy(rng_key, row_model, init_strategy):
    prepared = substitute(seed(row_model.model, rng_key), substitute_fn=init_strategy)
    model_trace = trace(prepared).get_trace(*row_model.args, **row_model.kwargs)
    return {name: model_trace[name]["value"] for name in row_model.sites}
