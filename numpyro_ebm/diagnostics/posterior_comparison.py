# SPDX-License-Identifier: Apache-2.0
"""Posteriors with log-likelihoods, compared by ArviZ's leave-one-out estimates."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpyro.infer import MCMC

from numpyro_ebm.diagnostics.arviz import to_arviz
from numpyro_ebm.diagnostics.comparison_table import same_data
from numpyro_ebm.errors import ModelError

__all__ = ["compare_posteriors", "is_of_posterior"]


def is_of_posterior(entry: Any) -> bool:
    """Whether an entry of :func:`~numpyro_ebm.compare` is a run, ArviZ data, or ArviZ's scores."""
    names = {x.__name__ for x in type(entry).__mro__}
    return isinstance(entry, MCMC) or bool(names & {"InferenceData", "DataTree", "ELPDData"})


def compare_posteriors(
    models: Mapping[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any], score: Any
) -> Any:
    """The table of ``arviz.compare``, once it is known that it can be made.

    :raises ModelError: if some are no posteriors, arguments or a score are given, one has no
        log-likelihood, or their data differ.
    """
    import arviz as az

    if args or kwargs or score is not None:
        raise ModelError(
            "compare: posteriors bring their data and their log-likelihoods. Give neither "
            "arguments nor `score` beside them; or compare points, `(model, params)`, at held-out "
            "rows."
        )
    others = [name for name, entry in models.items() if not is_of_posterior(entry)]
    if others:
        raise ModelError(
            f"compare: {', '.join(map(repr, others))} are no posteriors, and others are. A score "
            "that leaves each row out in turn does not compare with one of held-out rows: give "
            "all models the one or the other."
        )
    found = {name: _with_likelihood(name, entry) for name, entry in models.items()}
    (first, data), *rest = [(name, _observed(entry)) for name, entry in found.items()]
    for name, other in rest:
        if data and other and not same_data(data, other):
            raise ModelError(
                f"compare: '{first}' and '{name}' observe different data. Fit both to the same "
                "rows."
            )
    return az.compare(found)


def _with_likelihood(name, entry):
    """ArviZ data with a log-likelihood."""
    if isinstance(entry, MCMC):
        entry = to_arviz(entry)
    if hasattr(entry, "log_likelihood") or not hasattr(entry, "posterior"):
        return entry  # or scores, which ArviZ made of one
    raise ModelError(
        f"compare: the posterior '{name}' has no log-likelihood of rows: that of a loss, of "
        "`Exchange` or of an energy without log Z has none. Compare points at held-out rows, "
        "`(model, params)`, with a `score`; or draw from `normalized(model, log_normalizer)`."
    )


def _observed(entry):
    """Arrays of the observed data by name; none where there are none."""
    group = getattr(entry, "observed_data", None)
    if group is None:
        return {}
    return {name: np.asarray(x) for name, x in group.data_vars.items()}
