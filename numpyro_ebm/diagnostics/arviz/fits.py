# SPDX-License-Identifier: Apache-2.0
"""A fit by ``EnergySVI``, its parameters, losses and persistent chains, as arrays for ArviZ."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_ebm.diagnostics.arviz.groups import Converted
from numpyro_ebm.errors import ModelError
from numpyro_ebm.language.fixed import fixed
from numpyro_ebm.model.reading import read_model
from numpyro_ebm.objectives.persistent_chains import Chains
from numpyro_ebm.types import Model

__all__ = ["convert_fit"]


def convert_fit(
    fit: Any, model: Model | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Converted:
    """Groups *training* and *posterior*; those of chains as well if the fit has persistent ones.

    :param fit: what ``EnergySVI.run`` returned.
    :param model: the model that was trained, whose sites name the coordinates of the chains;
        ``None`` if it is not at hand.
    :param args, kwargs: its arguments.
    :return: :class:`~numpyro_ebm.diagnostics.arviz.groups.Converted`.
    """
    chains = getattr(fit.state, "objective_state", None)
    params = {name: np.asarray(x) for name, x in fit.params.items()}
    groups, dims = {"training": {"loss": np.asarray(fit.losses)}}, {}
    if model is not None:
        given = read_model(model, args, kwargs, may_observe_outside=True).parameters.keys()
        # A guide over parameters has parameters of its own: those of the model are not fixed.
        model = fixed(model, fit.params) if given <= fit.params.keys() else model
    elif args or kwargs:
        raise ModelError("to_arviz: arguments of the model need the model, `to_arviz(fit, model)`.")
    rounds = chains.remembered() if isinstance(chains, Chains) else {}
    if not rounds or not len(rounds["energy"]):
        groups["posterior"] = {name: x[None, None] for name, x in params.items()}
        return Converted(groups, dims, model, None)
    draws = {name: np.swapaxes(x, 0, 1) for name, x in rounds.items()}  # one chain a row
    groups["sample_stats"] = {"energy": draws.pop("energy")}
    if model is not None and "visible" in draws:
        row_model = read_model(model, args, kwargs)
        if not row_model.visible:
            raise ModelError(
                "to_arviz: to name the coordinates of the chains the model needs its data: "
                "`to_arviz(fit, model, data)`."
            )
        draws = _sites_of_chains(row_model, draws["visible"])
        dims |= {
            name: [d for d in row_model.visible[name].dims if d != row_model.plate]
            for name in draws
        }
    groups["posterior"] = draws
    groups["constant_data"] = params
    return Converted(groups, dims, model, None)


def _sites_of_chains(row_model, flat):
    """Site values of the coordinates of rows, (chains, draws, coordinates)."""
    like = jax.eval_shape(lambda: row_model.to_rows(row_model.unconstrain_visible()))
    start, draws = 0, {}
    for name in sorted(like):
        shape = like[name].shape[1:]
        stop = start + int(np.prod(shape))
        if stop > flat.shape[-1]:
            break
        u = np.reshape(flat[..., start:stop], (*flat.shape[:2], *shape))
        site = row_model.visible[name]
        v = np.asarray(u if site.is_unconstrained else site.transform(jnp.asarray(u)))
        v = v.astype(jnp.asarray(site.value).dtype)
        draws[name] = np.expand_dims(v, 2 + site.dims.index(row_model.plate))  # a plate of one row
        start = stop
    if start != flat.shape[-1] or set(draws) != set(like):
        raise ModelError(
            f"to_arviz: the chains have {flat.shape[-1]} coordinates, and a row of this model has "
            f"{sum(int(np.prod(x.shape[1:])) for x in like.values())}. Is it the model of the fit?"
        )
    return draws
