# SPDX-License-Identifier: Apache-2.0
"""What the diagnostics share: a fixed model read at rows of data, its latent sites integrated out.

A diagnostic takes the model as ``fixed(model, params)``, with the data as its first argument.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from numpyro.infer import MCMC

from numpyro_ebm.errors import ModelError
from numpyro_ebm.guides.guide import Guide
from numpyro_ebm.keys import default_key
from numpyro_ebm.marginals import Marginal, choose
from numpyro_ebm.model.reading import read_model
from numpyro_ebm.model.row_model import RowModel
from numpyro_ebm.types import Model, Params

__all__ = [
    "check_has_run",
    "map_leading",
    "pick_marginal",
    "read_guide",
    "read_rows",
    "refuse_weights",
]

AT_ONCE = 100
"""Particles, or draws, whose densities are evaluated together."""


def read_rows(
    who: str, model: Model, data: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> RowModel:
    """Read a fixed model at data.

    :raises ModelError: if it has free parameters, its data are missing, or its rows have weights.
    """
    if data is None:
        raise ModelError(f"{who}: `data` is None. Pass the rows, the model's first argument.")
    row_model = read_model(model, (data, *args), kwargs)
    if row_model.parameters:
        raise ModelError(
            f"{who}: the model has the free parameter(s) {sorted(row_model.parameters)}. Hold them "
            "fixed: `numpyro_ebm.fixed(model, params)`."
        )
    if not row_model.visible:
        raise ModelError(
            f"{who}: the model observes nothing. Give its first argument, the data, as `obs=` to "
            "the visible sites."
        )
    refuse_weights(who, row_model)
    return row_model


def check_has_run(who: str, mcmc: MCMC) -> None:
    """Raise if an ``MCMC`` has no draws yet."""
    if mcmc.last_state is None:
        raise ModelError(f"{who}: this MCMC has not been run. Call `mcmc.run` first.")


def refuse_weights(who: str, row_model: RowModel) -> None:
    """Raise if the rows of a model have weights, for one who counts them alike."""
    if row_model.row_weights is not None:
        raise ModelError(
            f"{who} counts every row once, and `handlers.scale` or `handlers.mask` says otherwise. "
            "Drop the masked rows, and read the model without these handlers."
        )


def read_guide(who: str, guide: Model, row_model: RowModel, params: Params | None) -> Guide:
    """Read a guide beside its model; every latent site and every parameter must be there."""
    reader = Guide(guide, row_model, row_model.args, row_model.kwargs)
    params = {} if params is None else params
    if not isinstance(params, dict):
        raise ModelError(
            f"{who}: the parameters of the guide must be a dict of values by site name, such as "
            f"`fit.params`, got {type(params).__name__}."
        )
    found = reader.parameters(default_key(), params)
    missing = sorted(name for name in found if name not in params)
    if missing:
        raise ModelError(
            f"{who}: no value for the parameter(s) {', '.join(map(repr, missing))} of the guide. "
            f"Pass the fitted ones, `fit.params` (there are {sorted(params) or 'none'})."
        )
    return reader


def pick_marginal(
    who: str,
    row_model: RowModel,
    marginal: Marginal | None,
    guide: Model | None,
    guide_params: Params | None,
) -> tuple[Marginal, Guide | None, Params]:
    """The marginal to integrate the latent sites out with, and the guide it draws from.

    :return: a :class:`~numpyro_ebm.marginals.Marginal`, a :class:`~numpyro_ebm.guides.guide.Guide`
        or ``None``, and a dict of its parameters.
    """
    marginal = choose(row_model) if marginal is None else marginal
    if not isinstance(marginal, Marginal):
        raise ModelError(
            f"{who}: `marginal` must be a marginal such as `VaGES()` or `Enumerated()`, got "
            f"{marginal!r}."
        )
    reader = None
    if guide is not None and row_model.latent:
        reader = read_guide(who, guide, row_model, guide_params)
    marginal.check(row_model, reader, 1)
    return marginal, reader, {} if guide_params is None else guide_params


def map_leading(fn: Callable[..., Any], tree: Any) -> Any:
    """``fn`` of every element of the leading axis, some at a time."""
    return jax.lax.map(fn, jax.tree.map(jnp.asarray, tree), batch_size=AT_ONCE)
