# SPDX-License-Identifier: Apache-2.0
r"""The table of a comparison: sums of scores, differences of models, and their standard errors.

.. math:: \widehat{\mathrm{se}}^2 = \sum_n w_n (s_n - \bar s)^2 + \sum_n w_n^2\, e_n^2
    + \Big(\sum_n w_n\Big)^2 \mathrm{mcse}^2_{\log Z}

for scores :math:`s_n`, or differences of them, of rows that count :math:`w_n` times; e is a row's
own error.
"""

from typing import Any

import numpy as np

from numpyro_ebm.diagnostics.row_scores import RowScores
from numpyro_ebm.errors import ModelError

__all__ = ["check_comparable", "comparison_table", "same_data"]

MOST_OF_ERROR = 0.5
"""Share of an error bar's square that one row, or log Z, may have before the table warns."""

ROUNDING = 1e-5
"""Error bars below this share of a sum are those of floats."""


def check_comparable(found: dict[str, RowScores], is_log: bool) -> None:
    """Raise unless all scores are of the same rows, on the same scale.

    :param dict found: scores by the name of the model.
    :param bool is_log: whether they are log-likelihoods.
    """
    (first, one), *others = found.items()
    for name, other in others:
        both = f"compare: '{first}' and '{name}'"
        if len(one.values) != len(other.values):
            raise ModelError(
                f"{both} have {len(one.values)} and {len(other.values)} rows. Score the same rows."
            )
        if not _are_close(one.weights, other.weights):
            raise ModelError(f"{both} give rows other weights, by `handlers.scale` or `mask`.")
        if one.data is not None and other.data is not None:
            if not same_data(one.data, other.data):
                raise ModelError(
                    f"{both} observe different data ({_shown_data(one.data)}; "
                    f"{_shown_data(other.data)}). Scores are compared at the same values of the "
                    "same visible sites; if a model transforms its data, let it do so inside of "
                    "its energy, with the log-Jacobian."
                )
            if is_log and one.is_discrete != other.is_discrete:
                raise ModelError(
                    f"{both} have a probability and a density of these rows, which differ by the "
                    "unit of the data. Give them base measures of one kind."
                )
        for what in sorted(one.coordinates.keys() | other.coordinates.keys()):
            pair = one.coordinates.get(what), other.coordinates.get(what)
            if any(x is None for x in pair) or not _are_close(*pair):
                raise ModelError(
                    f"{both} are not comparable by this score: {what} are not the same, as their "
                    "supports differ. Give their sites one support, or compare log-likelihoods "
                    "(`score=None`)."
                )


def _are_close(x, y):
    return np.shape(x) == np.shape(y) and bool(np.allclose(x, y, rtol=1e-5, equal_nan=True))


def same_data(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether visible values are the same, to the precision of the shorter floats."""
    if one.keys() != other.keys() and len(one) == len(other) == 1:
        return _are_close(*one.values(), *other.values())  # under another name
    return one.keys() == other.keys() and all(_are_close(one[k], other[k]) for k in one)


def _shown_data(data):
    return ", ".join(f"'{name}' of shape {np.shape(x)}" for name, x in sorted(data.items()))


def comparison_table(found: dict[str, RowScores], scale: str, is_log: bool) -> Any:
    """A data frame with a row for each model, the best first.

    :param dict found: scores by the name of the model.
    :param str scale: name of the scoring rule.
    :param bool is_log: whether they are log-likelihoods, which have weights.
    """
    import xarray as xr

    weights = next(iter(found.values())).weights
    total = {name: float(weights @ x.values) for name, x in found.items()}
    names = sorted(found, key=lambda name: -total[name])
    best = found[names[0]]
    of_sum = {name: _error(weights, found[name].values, [found[name]]) for name in names}
    of_gap = {
        name: _error(weights, found[name].values - best.values, [found[name], best])
        for name in names
    }
    of_gap[names[0]] = 0.0, False
    mixing = np.full(len(names), np.nan)
    if is_log:
        mixing = _stacking(weights, np.stack([found[name].values for name in names], -1))
    what = "elpd" if is_log else "score"
    columns: dict[str, Any] = {
        "rank": range(len(names)),
        what: [total[name] for name in names],
        f"{what}_diff": [total[name] - total[names[0]] for name in names],
        "weight": mixing,
        "se": [of_sum[name][0] for name in names],
        "dse": [of_gap[name][0] for name in names],
        "warning": [of_sum[name][1] or of_gap[name][1] for name in names],
        "scale": [scale] * len(names),
    }
    data = xr.Dataset({k: ("model", list(x)) for k, x in columns.items()}, {"model": names})
    return data.to_dataframe().rename_axis(None)


def _error(weights, values, scores):
    """Standard error of a weighted sum over rows, and whether it is to be doubted."""
    mean = weights @ values / np.sum(weights)
    of_rows = weights * (values - mean) ** 2
    of_log_z = sum(
        np.sum((weights * x.errors) ** 2) + (np.sum(weights) * x.shared_error) ** 2 for x in scores
    )
    square = np.sum(of_rows) + of_log_z
    rounding = ROUNDING * max(float(weights @ np.abs(x.values)) for x in scores)
    doubt = max(np.max(of_rows), of_log_z) > MOST_OF_ERROR * square > rounding**2
    return float(np.sqrt(square)), bool(doubt)


def _stacking(weights, values):
    """Weights of the mixture of all models that has the largest log-likelihood."""
    from scipy.optimize import minimize

    density = np.exp(values - np.max(values, 1, keepdims=True))
    share, num = weights / np.sum(weights), values.shape[1]

    def loss(w):
        mixed = np.maximum(density @ w, 1e-300)
        return -share @ np.log(mixed), -(share / mixed) @ density

    found: Any = minimize(
        loss,
        np.full(num, 1.0 / num),
        jac=True,
        bounds=[(0.0, 1.0)] * num,
        constraints=[{"type": "eq", "fun": lambda w: np.sum(w) - 1.0, "jac": np.ones_like}],
        method="SLSQP",
        options={"ftol": 1e-10},
    )
    return np.clip(found.x, 0.0, 1.0) / np.sum(np.clip(found.x, 0.0, 1.0))
