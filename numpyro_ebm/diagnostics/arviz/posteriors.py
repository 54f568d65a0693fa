# SPDX-License-Identifier: Apache-2.0
"""Posteriors of parameters as ArviZ data: a log-likelihood only where log Z was in it."""

import copy
import warnings
from collections.abc import Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
from jax import lax
from jax.typing import ArrayLike
from numpyro.infer import MCMC
from numpyro.primitives import Messenger

from numpyro_ebm._compat import find_stack_level, run_arguments
from numpyro_ebm.diagnostics.arviz.groups import (
    add_group,
    dataset_of,
    group_names,
    is_tree,
    path_free,
    replace_group,
)
from numpyro_ebm.errors import EmulationWarning, ModelError
from numpyro_ebm.model.plain_model import read_plain_model
from numpyro_ebm.program.compilation import run_compiled
from numpyro_ebm.types import Model

__all__ = ["is_of_parameters", "kind_of_posterior", "posterior_to_arviz"]

MOST_ERROR = 0.5
"""Nats of the log-likelihood that an emulated log Z may be wrong by at most draws."""


def kind_of_posterior(kernel: Any) -> str | None:
    """What the posterior of parameters that a kernel draws from is made of.

    :return: ``"likelihood"``, ``"loss"``, ``"exchange"``, or ``None`` if the kernel draws rows.
    """
    return next((owner.posterior_kind for owner in _owners(kernel)), None)


def is_of_parameters(mcmc: MCMC) -> bool:
    """Whether a run is one over parameters, or of an ordinary model, and not over rows."""
    if kind_of_posterior(mcmc.sampler):
        return True
    model = getattr(mcmc.sampler, "model", None)
    if mcmc.last_state is None or model is None:
        return False
    return read_plain_model(model, *run_arguments(mcmc)) is not None


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
    kind = kind_of_posterior(mcmc.sampler)
    has_likelihood = kind in ("likelihood", None)
    _check_emulation(mcmc.get_samples().get("log_normalizer_error"))
    idata = az.from_numpyro(_path_free(mcmc), log_likelihood=has_likelihood)
    if "observed_data" in group_names(idata):
        # Energies, losses and factors are observed sites without a value; of several visible sites
        # the first has the log-likelihood of the row.
        data = dataset_of(idata["observed_data"])
        empty = [k for k, x in data.data_vars.items() if x.size == 0]
        replace_group(idata, "observed_data", data.drop_vars(empty))
        if "log_likelihood" in group_names(idata):
            data = dataset_of(idata["log_likelihood"])
            others = [k for k in data.data_vars if k not in empty][1:]
            replace_group(
                idata, "log_likelihood", data.drop_vars([*others, *empty], errors="ignore")
            )
    if kind != "exchange":
        _add_densities(idata, mcmc)
    owner = next(_owners(mcmc.sampler), None)
    if getattr(owner, "is_adjusted", False):
        _adjust(idata, owner, mcmc)
    return idata


class _PathFree(Messenger):
    """Rename the sites and plates of a model, as handlers outside see it."""

    def __init__(self, fn: Model):
        self._own = []  # of the messages that are under way
        super().__init__(fn)

    def process_message(self, msg: dict[str, Any]) -> None:
        frames = msg.get("cond_indep_stack", [])
        self._own.append({k: msg[k] for k in ("name", "cond_indep_stack") if k in msg})
        if "name" in msg:
            msg["name"] = path_free(msg["name"])
        if frames:
            msg["cond_indep_stack"] = [x._replace(name=path_free(x.name)) for x in frames]

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        msg.update(self._own.pop())  # handlers inside come next


def _path_free(mcmc):
    """A run whose names are no paths, where they would be."""
    draws = mcmc.get_samples()
    if not is_tree() or not any("/" in name for name in draws):
        return mcmc

    def get_samples(**options):
        return {path_free(name): x for name, x in mcmc.get_samples(**options).items()}

    renamed = copy.copy(mcmc)
    renamed.sampler = SimpleNamespace(model=_PathFree(mcmc.sampler.model))
    renamed.get_samples = get_samples
    return renamed


def _add_densities(idata, mcmc):
    """``lp`` of all draws, and the energy of their positions where the run collected no other."""
    has_stats = "sample_stats" in group_names(idata)
    stats = dataset_of(idata["sample_stats"]) if has_stats else dataset_of(idata["posterior"])[[]]
    model, (args, kwargs) = mcmc.sampler.model, run_arguments(mcmc)
    if "lp" not in stats:
        plain = read_plain_model(model, args, kwargs)
        draws = mcmc.get_samples()
        values = {name: draws[name] for name in plain.visible if name in draws} if plain else {}
        if plain is None or len(values) < len(plain.visible) or plain.summed.keys() & draws.keys():
            return  # blocks of `Gibbs` draw what is summed out here
        lp = run_compiled(lambda x: lax.map(lambda v: plain.log_density_at(v), x), values)
        lp = np.asarray(lp).reshape(mcmc.num_chains, -1)
        stats = stats.assign(lp=(("chain", "draw"), lp))
    if "energy" not in stats:
        stats = stats.assign(energy=-stats["lp"])
    if has_stats:
        replace_group(idata, "sample_stats", stats)
    else:
        add_group(idata, "sample_stats", stats)


def _adjust(idata, model, mcmc):
    """Draws at the width of their estimator as *posterior*, those of the run as *posterior_raw*."""
    args, kwargs = run_arguments(mcmc)
    found = model.adjust(mcmc.get_samples(group_by_chain=True), *args, **kwargs)
    found = {path_free(k) if is_tree() else k: x for k, x in found.items()}
    raw = dataset_of(idata["posterior"])
    adjusted = raw.drop_vars([name for name in raw.data_vars if name not in found])
    adjusted = adjusted.assign({k: (raw[k].dims, np.asarray(found[k])) for k in adjusted.data_vars})
    adjusted.attrs["adjusted"] = f"open-faced sandwich, learning rate {model.learning_rate:.6g}"
    replace_group(idata, "posterior", adjusted)
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
