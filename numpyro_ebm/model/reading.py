# SPDX-License-Identifier: Apache-2.0
r"""The one door from NumPyro to arrays.

A model is traced once, to find its data plate, its visible and latent sites, its parameters, and
the operations by which it comes to

.. math:: \log \tilde p(v, h; θ) = \sum_{\text{sites of the row}} \log b - \sum_{\text{energies}} E.

:func:`read_model` makes a :class:`~numpyro_ebm.model.row_model.RowModel` of a model,
:func:`read_fixed_model` one of a model with fixed parameters;
:class:`~numpyro_ebm.guides.guide.Guide` does the same for a guide.
"""

from typing import Any

import jax

from numpyro_ebm.errors import ModelError
from numpyro_ebm.model import provenance
from numpyro_ebm.model.obs_masks import RowsObserved
from numpyro_ebm.model.row_analysis import check_rows
from numpyro_ebm.model.row_model import RowModel
from numpyro_ebm.model.traced_model import TracedModel, trace_model
from numpyro_ebm.types import Model, Params

__all__ = ["bind_fixed", "read_fixed_model", "read_model"]


def read_model(
    model: Model,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    params: Params | None = None,
    *,
    rng_key: jax.Array | None = None,
    may_observe_outside: bool = False,
) -> RowModel:
    """Read a NumPyro model with energy statements.

    :param model: the model.
    :param tuple args: its arguments.
    :param dict kwargs: its keyword arguments.
    :param dict params: parameter values by name; missing ones take their initial values.
    :param rng_key: key for initial values and subsampled plates.
    :param bool may_observe_outside: accept observed sites outside the data plate: likelihoods of
        their own, and parameters that are conditioned. They are no part of the rows.
    :return: a :class:`~numpyro_ebm.model.row_model.RowModel`.
    :raises ModelError: if there is no data plate or more than one, no energy, or an energy that
        does not depend on the visible sites; the message names the site and what to write instead.
    """

    def trace(model):
        return trace_model(model, args, kwargs, params, may_observe_outside=may_observe_outside)

    traced = trace(model)
    if traced.row_observed is not None:
        traced = trace(RowsObserved(model, traced.row_observed))
    row_model = traced.bind(rng_key)
    provenance.check_model(row_model)
    check_rows(row_model)
    return row_model


def read_fixed_model(
    model: Model,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    rng_key: jax.Array | None = None,
) -> RowModel:
    """Read a model with fixed parameters as the density of its unobserved sites.

    In the joint that is returned the *visible* sites are the unobserved continuous ones, and the
    *latent* sites the unobserved discrete ones and those that are to be
    :class:`~numpyro_ebm.language.handlers.integrated`; observed sites keep their values.

    :param model: a model whose normalizer is resolved, ``fixed(model, params)``.
    :param tuple args: its arguments.
    :param dict kwargs: its keyword arguments.
    :param rng_key: key for the placeholders of unobserved sites.
    :return: a :class:`~numpyro_ebm.model.row_model.RowModel`.
    :raises ModelError: if the model has free parameters, or nothing to sample.
    """
    traced = trace_model(model, args, kwargs)
    row_model = bind_fixed(traced, rng_key)
    check_rows(row_model)
    return row_model


def bind_fixed(traced: TracedModel, rng_key: jax.Array | None = None) -> RowModel:
    """What :func:`read_fixed_model` returns, of a model that it has read before."""
    row_model = traced.bind(rng_key)
    if row_model.parameters or not row_model.is_fixed:
        free = ", ".join(map(repr, row_model.parameters)) or "none, but nobody said so"
        raise ModelError(
            f"The normalizer of the energies {row_model.energies} is not resolved (free "
            f"parameters: {free}). Hold the parameters fixed: `numpyro_ebm.fixed(model, params)`."
        )
    if not row_model.latent:
        raise ModelError("The model has no unobserved site inside its data plate to sample.")
    sites = row_model.latent
    row_model.observed, row_model.visible = {**row_model.observed, **row_model.visible}, {}
    return row_model.with_latent(
        [k for k, site in sites.items() if site.is_discrete or k in row_model.integrated]
    )
