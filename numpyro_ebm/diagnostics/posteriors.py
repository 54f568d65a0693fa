# SPDX-License-Identifier: Apache-2.0
"""Posteriors of parameters as ArviZ data: a log-likelihood only where log Z was in it."""

from functools import partial

import xarray as xr

from numpyro_ebm.errors import ModelError

__all__ = ["kind_of_posterior", "posterior_to_arviz"]


def kind_of_posterior(kernel):
    """What the posterior of parameters that a kernel draws from is made of.

    :return: ``"likelihood"``, ``"loss"``, ``"exchange"``, or ``None`` if the kernel draws rows.
    """
    kinds = [kind_of_posterior(inner) for inner, _ in getattr(kernel, "blocks", ())]
    model = getattr(kernel, "model", None)
    while isinstance(model, partial):  # what `Gibbs` makes of the models of its blocks
        model = model.args[0]
    kinds += [getattr(owner, "posterior_kind", None) for owner in (kernel, model)]
    return next((kind for kind in kinds if kind), None)


def posterior_to_arviz(mcmc, others, observed, fantasies):
    """What ``arviz.from_numpyro`` makes of a run, without what is no likelihood and no data."""
    import arviz as az

    if any(x is not None for x in (*others, observed, fantasies)):
        raise ModelError(
            "to_arviz: a posterior of parameters brings its model, data and log-likelihood; give "
            "nothing beside it."
        )
    if mcmc.last_state is None:
        raise ModelError("to_arviz: this MCMC has not been run.")
    has_likelihood = kind_of_posterior(mcmc.sampler) == "likelihood"
    idata = az.from_numpyro(mcmc, log_likelihood=has_likelihood)
    for group in ("observed_data", "log_likelihood"):
        if group in _groups(idata):
            data = _dataset(idata[group])
            # Energies and losses are observed sites without a value; of several visible sites the
            # first has the log-likelihood of the row.
            empty = [k for k, x in data.data_vars.items() if x.size == 0]
            if group == "log_likelihood":
                empty = list(data.data_vars)[1:]
            _replace(idata, group, data.drop_vars(empty))
    return idata


def _groups(idata):
    return list(idata.groups()) if hasattr(idata, "add_groups") else list(idata.children)


def _dataset(group):
    return group if isinstance(group, xr.Dataset) else group.to_dataset()


def _replace(idata, group, data):
    if not data.data_vars:
        del idata[group]
    elif hasattr(idata, "add_groups"):
        setattr(idata, group, data)
    else:
        idata[group] = xr.DataTree(data)
