# SPDX-License-Identifier: Apache-2.0
"""Initial values of a chain: those of a strategy, and those that are given.

Rows at which the energy is not finite, behind a hard wall for one, are drawn anew, as NumPyro does
it for NUTS.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from numpyro.handlers import seed, substitute, trace
from numpyro.infer import init_to_value

from numpyro_ebm._compat import GIBBS_SITES_KWARG
from numpyro_ebm.errors import ModelError, shown
from numpyro_ebm.inputs import numbers_of
from numpyro_ebm.language.explained import wrong_value
from numpyro_ebm.model.plain_model import PlainModel
from numpyro_ebm.model.row_model import RowModel
from numpyro_ebm.types import Params, SiteValues

__all__ = [
    "MAX_DRAWS",
    "check_strategy",
    "given_values",
    "initial_values",
    "redrawn",
    "started",
    "unconstrained_values",
]

ADVICE = (
    " For a kernel on part of the sites do not hide the others by `block`: move them in blocks of "
    "`numpyro.infer.Gibbs`, or integrate real ones out, `numpyro_ebm.integrated(model, {unknown})`."
)

MAX_DRAWS = 100
"""How often the initial values of a row are drawn until its energy is finite."""


def given_values(init_params: Any, num_chains: int | None = None) -> SiteValues | None:
    """What a caller says where chains start, as arrays by site.

    :param init_params: the dict, or ``None``.
    :param num_chains: how many chains lead in its arrays, if any do.
    :raises ModelError: if it is no dict, holds no numbers or not one value for each chain.
    """
    if init_params is None:
        return None
    if not isinstance(init_params, dict):
        raise ModelError(
            f"`init_params` must be a dict of values by site name, got {shown(init_params)}."
        )
    arrays = numbers_of("`init_params`", finite=False, **init_params)
    given = dict(zip(init_params, arrays, strict=True))
    for name, x in given.items():
        if num_chains is not None and jnp.shape(x)[:1] != (num_chains,):
            raise ModelError(
                f"`init_params` gives '{name}' the shape {x.shape}, and {num_chains} chains start "
                f"there, which lead: ({num_chains}, ...)."
            )
    return given


def started(z: SiteValues, given: SiteValues | None, advice: str = "") -> SiteValues:
    """Initial values, with those that are given in the place of those of a strategy.

    :param dict z: values of the strategy.
    :param given: values that are given, by site.
    :param str advice: what else to do about a name that is unknown.
    :raises ModelError: if values are given of other sites, or of another shape.
    """
    given = given or {}
    unknown = sorted(set(given) - set(z))
    if unknown:
        raise ModelError(
            f"`init_params` names {unknown}, which are not what is moved; that is {sorted(z)}."
            + advice.format(unknown=unknown)
        )
    for name, x in given.items():
        if jnp.shape(x) != jnp.shape(z[name]):
            raise ModelError(
                f"`init_params` gives '{name}' the shape {jnp.shape(x)}, and in unconstrained "
                f"coordinates it has {jnp.shape(z[name])}, with the chains leading if there are "
                "several."
            )
    return {k: jnp.asarray(given.get(k, x), jnp.result_type(x)) for k, x in z.items()}


def initial_values(
    rng_key: jax.Array,
    row_model: RowModel,
    init_strategy: Callable[..., Any],
    init_params: Params | None,
) -> SiteValues:
    """Initial values of all unobserved sites, on their supports.

    :raises ModelError: if values are given of what is no unobserved site, or of another shape.
    """
    return started(_values_of_strategy(rng_key, row_model, init_strategy), init_params)


def unconstrained_values(
    rng_key: jax.Array,
    row_model: RowModel | PlainModel,
    init_strategy: Callable[..., Any],
    init_params: Params | None,
) -> SiteValues:
    """Initial unconstrained values of the real sites.

    :raises ModelError: if values are given of what is no unobserved site, or of another shape.
    """
    of_gibbs = GIBBS_SITES_KWARG in row_model.kwargs  # Gibbs hands over constrained values
    given = init_params or {}
    if isinstance(row_model, PlainModel):
        given = row_model.unconstrain(given) if given and of_gibbs else given
        z = row_model.start(rng_key, init_strategy)
        check_strategy(init_strategy, z)
        return started(z, given)
    values = _values_of_strategy(rng_key, row_model, init_strategy)
    z = {name: site.unconstrain_draw(values[name]) for name, site in row_model.visible.items()}
    given = {k: x for k, x in given.items() if k not in row_model.latent}  # which are summed out
    if of_gibbs and given.keys() <= z.keys():
        given = {k: row_model.visible[k].transform.inv(x) for k, x in given.items()}
    return started(z, given, ADVICE)


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


def check_strategy(init_strategy: Callable[..., Any], names: Iterable[str]) -> None:
    """Raise if all values of a strategy are of other sites: NumPyro would use none of them.

    :param init_strategy: ``init_to_value(values=...)``, or another one, which has none.
    :param names: what starts somewhere.
    """
    if not isinstance(init_strategy, partial) or init_strategy.func is not init_to_value:
        return
    values = init_strategy.keywords["values"]
    if not isinstance(values, dict):
        raise ModelError(
            f"`init_to_value(values=...)` must be a dict by site name, got {shown(values)}."
        )
    if values and not set(values) & set(names):
        raise ModelError(
            f"`init_to_value` names {sorted(values)}, and what starts there is {sorted(names)}."
        )


def _values_of_strategy(rng_key, row_model, init_strategy):
    check_strategy(init_strategy, row_model.sites)
    prepared = substitute(seed(row_model.model, rng_key), substitute_fn=init_strategy)
    model_trace = trace(prepared).get_trace(*row_model.args, **row_model.kwargs)
    values = {name: model_trace[name]["value"] for name in row_model.sites}
    for name, x in values.items():  # which may broadcast
        why = wrong_value(name, x, model_trace[name]["fn"].shape())
        if why is not None:
            raise ModelError(why)
    return {name: jnp.asarray(x) for name, x in values.items()}
