# SPDX-License-Identifier: Apache-2.0
"""Posteriors of parameters as ArviZ data: a log-likelihood only where log Z was in it."""

import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from jax.typing import ArrayLike
from numpyro.infer import MCMC

from numpyro_ebm._compat import find_stack_level, run_arguments
from numpyro_ebm.diagnostics.arviz.groups import add_group
from numpyro_ebm.errors import EmulationWarning, ModelError

__all__ = ["kind_of_posterior", "posterior_to_arviz"]

MOST_ERROR = 0.5
"""Nats of the log-likelihood that an emulated log Z may be wrong by at most draws."""


def kind_of_posterior(kernel: Any) -> str | None:
    """What the posterior of parameters that a kernel draws from is made of.

    :return: ``"likelihood"``, ``"loss"``, ``"exchange"``, or ``None`` if the kernel draws rows.
    """
    return next((owner.posterior_kind for owner in _owners(kernel)), None)


def _owners(kernel):
    """Kernels and models that are made of a posterior of parameters."""
    for inner, _ in getattr(kernel, "blocks", ()):
        yield from _owners(inner)
    model = getattr(kernel, "model", None)
    while isinstance(model, partial):  # what `Gibbs` makes of the models of its blocks
        model = model.args[0]
    owners: tuple[Any, ...] = (kernel, model)
    yield from (owner for owner in owners if getattr(owner, "posterior_kind", None))


def posterior_to_arviz(
    mcmc: MCMC, others: Any, observed: Any, fantasies: Mapping[str, ArrayLike] | None
) -> Any:
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
    _check_emulation(mcmc.get_samples().get("log_normalizer_error"))
    idata = az.from_numpyro(mcmc, log_likelihood=has_likelihood)
    if "observed_data" in _groups(idata):
        # Energies, losses and factors are observed sites without a value; of several visible sites
        # the first has the log-likelihood of the row.
        data = _dataset(idata["observed_data"])
        empty = [k for k, x in data.data_vars.items() if x.size == 0]
        _replace(idata, "observed_data", data.drop_vars(empty))
        if "log_likelihood" in _groups(idata):
            data = _dataset(idata["log_likelihood"])
            others = [k for k in data.data_vars if k not in empty][1:]
            _replace(idata, "log_likelihood", data.drop_vars([*others, *empty], errors="ignore"))
    owner = next(_owners(mcmc.sampler))
    if getattr(owner, "is_adjusted", False):
        _adjust(idata, owner, mcmc)
    return idata


def _adjust(idata, model, mcmc):
    """Draws at the width of their estimator as *posterior*, those of the run as *posterior_raw*."""
    args, kwargs = run_arguments(mcmc)
    found = model.adjust(mcmc.get_samples(group_by_chain=True), *args, **kwargs)
    raw = _dataset(idata["posterior"])
    adjusted = raw.drop_vars([name for name in raw.data_vars if name not in found])
    adjusted = adjusted.assign({k: (raw[k].dims, np.asarray(found[k])) for k in adjusted.data_vars})
    adjusted.attrs["adjusted"] = f"open-faced sandwich, learning rate {model.learning_rate:.6g}"
    _replace(idata, "posterior", adjusted)
    add_group(idata, "posterior_raw", raw)


def _check_emulation(error):
    """Warn of an emulated log Z outside of its design."""
    if error is None or not np.median(error) > MOST_ERROR:
        return
    warnings.warn(
        EmulationWarning(
            "to_arviz: half of the draws have a log-likelihood that is known to "
            f"{np.median(error):.3g} nats or worse ('log_normalizer_error'): they lie where log Z "
            "was not estimated. Give `emulate_log_normalizer` a larger `design`, one around the "
            "posterior (draws of this run, of `generalized`, or of a guide in `EnergySVI`), or "
            "take another route."
        ),
        stacklevel=find_stack_level(),
    )


def _groups(idata):
    return list(idata.groups()) if hasattr(idata, "add_groups") else list(idata.children)


def _dataset(group):
    return group.to_dataset() if hasattr(group, "to_dataset") else group


def _replace(idata, group, data):
    if not data.data_vars:
        del idata[group]
    elif hasattr(idata, "add_groups"):
        setattr(idata, group, data)
    else:
        import xarray as xr

        idata[group] = xr.DataTree(data)
