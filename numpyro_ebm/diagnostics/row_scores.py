# SPDX-License-Identifier: Apache-2.0
r"""Scores of rows under one fixed model, by a proper scoring rule: log-likelihoods or local scores.

The log score is :math:`\log p(v)`. A local score is minus the loss of one row by an objective that
needs no normalizer, such as :math:`-\tfrac12 \|s(v)\|^2 - \operatorname{tr} ∇_v s(v)`, half of
Hyvärinen's with its sign changed. Such an objective is linear in the weights of the rows, and its
gradient in them is the loss of every row.
"""

import copy
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_ebm.errors import ModelError
from numpyro_ebm.log_normalizers import LogLikelihood, log_likelihood, log_normalizer
from numpyro_ebm.model.finite_supports import lowest_count, support_values
from numpyro_ebm.model.reading import read_fixed_model, read_model
from numpyro_ebm.model.row_model import RowModel
from numpyro_ebm.objectives.base import Objective
from numpyro_ebm.printed import brief
from numpyro_ebm.program.compilation import run_compiled
from numpyro_ebm.types import Model

__all__ = ["RowScores", "local_scores", "log_scores", "scores_of_rows"]

BRIEFLY = {"num_particles": 16, "num_sweeps": 1, "num_temperatures": 2, "num_replicates": 2}
"""Options of log Z where it is asked only whether it is finite."""


class RowScores(NamedTuple):
    """What one model says of the rows.

    - **values** - scores, (rows,), the higher the better.
    - **errors** - their own standard errors, (rows,).
    - **shared_error** - the error of log Z that all rows have in common.
    - **weights** - how often the rows count, (rows,).
    - **data** - the visible values by site; ``None`` where they are not known.
    - **is_discrete** - whether scores are of probabilities and not of densities; ``None`` likewise.
    - **coordinates** - arrays by name, of what a local score takes its derivatives or neighbours
      in; scores with others are of another scale.
    """

    values: np.ndarray
    errors: np.ndarray
    shared_error: float
    weights: np.ndarray
    data: dict[str, np.ndarray] | None
    is_discrete: bool | None
    coordinates: dict[str, np.ndarray]

    __repr__ = brief


def log_scores(
    rng_key: jax.Array,
    model: Model,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    options: dict[str, Any],
) -> RowScores:
    """Log-likelihoods of rows under a fixed model, by :func:`~numpyro_ebm.log_likelihood`."""
    row_model = _read_fixed(model, args, kwargs)
    found = log_likelihood(rng_key, model, *args, with_error=True, **options, **kwargs)
    weights = _weights(row_model)
    counts = weights > 0

    def of_one(x):  # without its weight, which the error of log Z has not
        return np.where(counts, np.asarray(x, float) / np.where(counts, weights, 1.0), 0.0)

    found = found._replace(value=of_one(found.value), mcse=of_one(found.mcse))
    sites = row_model.visible.values()
    return scores_of_rows(found)._replace(
        weights=weights,
        data=_data(row_model),
        is_discrete=all(site.is_discrete for site in sites),
    )


def scores_of_rows(found: LogLikelihood) -> RowScores:
    """Log-likelihoods that have been computed before."""
    values, mcse = (np.asarray(x, float) for x in (found.value, found.mcse))
    of_log_z = np.asarray(found.log_normalizer.mcse, float)
    shared = float(of_log_z) if of_log_z.ndim == 0 else 0.0
    own = np.sqrt(np.maximum(np.broadcast_to(mcse, values.shape) ** 2 - shared**2, 0.0))
    return RowScores(values, own, shared, np.ones(values.shape), None, None, {})


def local_scores(
    rng_key: jax.Array,
    model: Model,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    objective: Objective,
    check_integrable: bool,
) -> RowScores:
    """Minus the losses of rows by an objective that is a scoring rule."""
    key_loss, key_check = jax.random.split(rng_key)
    _read_fixed(model, args, kwargs)
    problem = objective.prepare(key_loss, {}, model, None, args, kwargs)
    row_model = problem.row_model
    weights, ones = _weights(row_model), jnp.ones(row_model.num_rows)

    def loss(weights):
        rows = copy.copy(row_model)
        rows.row_weights = weights
        found = objective.energy_loss(key_loss, {}, problem._replace(row_model=rows))
        return row_model.num_rows * found

    values = -np.asarray(run_compiled(jax.grad(loss), ones), float)
    if check_integrable:
        _check_integrable(key_check, row_model, model, args, kwargs)
    return RowScores(
        np.where(weights > 0, values, 0.0),
        np.zeros(values.shape),
        0.0,
        weights,
        _data(row_model),
        None,
        _coordinates_of_score(row_model),
    )


def _read_fixed(model, args, kwargs):
    row_model = read_model(model, args, kwargs)
    if row_model.parameters or not row_model.is_fixed:
        read_fixed_model(model, args, kwargs)  # raises, and says why
    if not row_model.visible:
        raise ModelError("it observes nothing. Pass the rows as the model's data.")
    return row_model


def _weights(row_model):
    weights = row_model.row_weights
    return np.ones(row_model.num_rows) if weights is None else np.asarray(weights, float)


def _data(row_model):
    return {name: np.asarray(x) for name, x in row_model.visible_values.items()}


def _coordinates_of_score(row_model: RowModel):
    """Unconstrained values and the Jacobian there, or the values that neighbours are taken from."""
    of = lambda name: f" of '{name}'" if len(row_model.visible) > 1 else ""  # noqa: E731
    found = {}
    for name, site in row_model.visible.items():
        if site.is_discrete:
            lowest = lowest_count(site)
            values = support_values(site, "compare") if lowest is None else np.array([lowest])
            found[f"the values{of(name)}"] = np.asarray(values)
    if not found:
        unconstrained = row_model.unconstrain_visible()
        _, log_det = row_model.constrain(unconstrained)
        found = {f"the coordinates{of(k)}": np.asarray(x) for k, x in unconstrained.items()}
        found["their Jacobian"] = np.asarray(log_det)
    return found


def _check_integrable(rng_key, row_model, model, args, kwargs):
    """Raise where exp(-E) is found to have no integral: its scores are those of no law."""
    discrete = [site for site in row_model.sites.values() if site.is_discrete]
    if len(discrete) == len(row_model.sites) or any(
        lowest_count(site) is not None for site in discrete
    ):
        return  # a finite sum, or one without an end, of which nothing is known
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its accuracy
        log_normalizer(rng_key, model, *args, **BRIEFLY, **kwargs)
