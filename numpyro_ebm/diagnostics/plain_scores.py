# SPDX-License-Identifier: Apache-2.0
"""Log-likelihoods of rows under a model that has them itself: `normalized`, or an ordinary one."""

from typing import Any

import numpy as np
from numpyro.handlers import seed, trace

from numpyro_ebm.diagnostics.row_scores import RowScores
from numpyro_ebm.errors import ModelError
from numpyro_ebm.keys import default_key
from numpyro_ebm.model.priors import UnsetParams
from numpyro_ebm.types import Model

__all__ = ["plain_scores"]


def plain_scores(model: Model, args: tuple[Any, ...], kwargs: dict[str, Any]) -> RowScores:
    """Log-likelihoods of rows under a NumPyro model without free parameters and latent sites.

    :param model: the model, its parameters substituted.
    :raises ModelError: if sites are left that are neither observed nor substituted, if it has a
        factor or weights, or if its observed sites have no common axis of rows.
    """
    unset = UnsetParams(model)
    sites = trace(seed(unset, default_key())).get_trace(*args, **kwargs)
    samples = {name: site for name, site in sites.items() if site["type"] == "sample"}
    free = [k for k, x in samples.items() if not x["is_observed"] and _is_drawn(x)]
    free += sorted(unset.names)
    if free:
        raise ModelError(
            f"no value for its site(s) {', '.join(map(repr, free))}. Give parameters, `(model, "
            "params)`; a latent site of the rows has to be summed or integrated out."
        )
    observed = {name: site for name, site in samples.items() if site["is_observed"]}
    if not observed:
        raise ModelError("it observes nothing. Pass the rows as the model's data.")
    for name, site in observed.items():
        if site["fn"].event_shape == (0,):
            raise ModelError(
                f"it has the factor '{name}', and so no likelihood of rows. State an energy, or "
                "give `log_likelihood(rng_key, fixed(model, params), ..., log_normalizer=log_z, "
                "with_error=True)`."
            )
        if site["scale"] is not None:
            raise ModelError(f"its site '{name}' has a weight. Give its energy, with parameters.")
    values = {k: np.asarray(x["fn"].log_prob(x["value"]), float) for k, x in observed.items()}
    if len({x.shape for x in values.values()}) > 1 or next(iter(values.values())).ndim != 1:
        shapes = {name: x.shape for name, x in values.items()}
        raise ModelError(
            f"its log-likelihoods have the shapes {shapes}, and not one axis of rows. Make other "
            "axes event dimensions, `dist.to_event`."
        )
    total = np.sum(list(values.values()), 0)
    return RowScores(
        total,
        np.zeros(total.shape),
        0.0,
        np.ones(total.shape),
        {name: np.asarray(site["value"]) for name, site in observed.items()},
        all(site["fn"].support.is_discrete for site in observed.values()),
        {},
    )


def _is_drawn(site):
    # `seed` gives a random key to sites that have no value.
    return site["kwargs"].get("rng_key") is not None
