# SPDX-License-Identifier: Apache-2.0
r"""Comparison of energy-based models on rows, in a table as ArviZ makes it.

.. math:: \widehat{\mathrm{elpd}} = \sum_n \log p(v_n), \qquad
    \widehat{\mathrm{se}}^2 = \sum_n (s_n - \bar s)^2 + (N\, \mathrm{mcse}_{\log Z})^2

with :math:`s_n` the scores of rows, or the differences of two models' scores of the same rows,
which are far less noisy than the scores are. Where log Z is out of reach a proper *local* score
takes the place of log p: it is least (here, with its sign changed, largest) in expectation at the
law of the data, and Z is not in it.
"""

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import jax
import numpy as np
from numpyro.handlers import substitute
from numpyro.infer.svi import SVIRunResult

from numpyro_ebm.diagnostics.comparison_table import check_comparable, comparison_table
from numpyro_ebm.diagnostics.plain_scores import plain_scores
from numpyro_ebm.diagnostics.posterior_comparison import compare_posteriors, is_of_posterior
from numpyro_ebm.diagnostics.row_scores import (
    RowScores,
    local_scores,
    log_scores,
    scores_of_rows,
)
from numpyro_ebm.errors import ModelError
from numpyro_ebm.keys import default_key
from numpyro_ebm.language.fixed import fixed
from numpyro_ebm.log_normalizers import LogLikelihood
from numpyro_ebm.model.plain_model import states_energy
from numpyro_ebm.model.reading import read_model
from numpyro_ebm.objectives import (
    DiscreteFisher,
    PseudoLikelihood,
    RatioMatching,
    ScoreMatching,
)
from numpyro_ebm.objectives.base import Objective
from numpyro_ebm.signatures import explaining

__all__ = ["ScoreName", "compare"]

ScoreName: TypeAlias = Literal[
    "hyvarinen", "pseudo_likelihood", "ratio_matching", "discrete_fisher"
]

RULES = {
    "hyvarinen": ScoreMatching,
    "pseudo_likelihood": PseudoLikelihood,
    "ratio_matching": RatioMatching,
    "discrete_fisher": DiscreteFisher,
}


@explaining
def compare(
    models: Mapping[str, Any],
    *args: Any,
    score: ScoreName | Objective | None = None,
    rng_key: jax.Array | None = None,
    check_integrable: bool = True,
    options: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    r"""Compare models by their scores of the same rows, which none of them was trained on.

    ========================= ================================= ==================================
    ``score``                 of                                a row's score, the higher the better
    ========================= ================================= ==================================
    ``None``                  any model                         :math:`\log p(v)`
    ``"hyvarinen"``           real visible sites, no log Z      :math:`-\tfrac12\|s\|^2
                                                                - \operatorname{tr} ∇_v s`
    ``"pseudo_likelihood"``   discrete ones, no log Z           :math:`\sum_d \log p(v_d \mid
                                                                v_{-d})`
    ``"ratio_matching"``      bits, no log Z                    that of ``RatioMatching``
    ``"discrete_fisher"``     discrete ones, counts without     that of ``DiscreteFisher``
                              an end too, no log Z
    an objective              what the objective is for         minus its loss of the row
    ========================= ================================= ==================================

    Each rule is proper: in expectation no model scores higher than the law of the data. Local
    scores do not see the weights of modes that are far apart.

    :param dict models: by name, each one of

        - a fixed model, ``fixed(model, params)``;
        - ``(model, fit)``, with the result of :class:`~numpyro_ebm.EnergySVI` or a dict of
          parameters. A :class:`~numpyro_ebm.normalized` or an ordinary NumPyro model without latent
          sites may stand there too, as a baseline;
        - log-likelihoods that have been computed, ``log_likelihood(..., with_error=True)``;
        - or, for all of them, posteriors with a log-likelihood: an ``MCMC`` on ``normalized``, or
          what ArviZ makes of it. These are handed to ``arviz.compare``, which leaves rows out.
    :param args: arguments of the models, held-out rows among them; all models get the same.
    :param score: the scoring rule; see above.
    :param rng_key: random key, where log Z is estimated; one of the library's own if ``None``.
    :param bool check_integrable: for a local score of real sites, whether to look if exp(-E) has an
        integral: without one there is no law to be scored. It costs a short run of chains where
        there are more than two coordinates and the energy is not quadratic.
    :param dict options: of :func:`~numpyro_ebm.log_likelihood`: ``method``, ``num_particles``, ...
    :param kwargs: keyword arguments of the models.
    :return: a ``pandas.DataFrame``, a row for each model, the best one first, with the columns
        ``rank``; ``elpd``, the sum of log-likelihoods, or ``score``, that of scores; ``elpd_diff``
        or ``score_diff``, what the model lacks to the best one (zero or negative); ``weight``, by
        stacking (NaN for local scores, which are no densities to be mixed); ``se`` and ``dse``, the
        standard errors of the sum and of the difference, over rows and of log Z; ``warning``, where
        a single row or the error of log Z makes up more than half of such an error's square;
        ``scale``, ``"log"`` or the name of the rule. For posteriors, what ``arviz.compare`` gives.
    :raises ModelError: if models are scored at different data or with different weights of rows,
        densities beside probabilities, or local scores in different coordinates (the score of
        log v is not that of v); if a model has free parameters, observes nothing or has no
        integral; if a score is not finite, or its rule does not serve.

    .. note:: Scores of rows that a model was trained on are too good, by about a nat for each
       parameter, and nobody can tell such rows from others: hold rows out, or compare posteriors,
       where ``arviz.compare`` leaves each row out.

    Reference: Gneiting, Raftery, *Strictly proper scoring rules, prediction, and estimation*, JASA
    2007; Dawid, Musio, *Bayesian model selection based on proper scoring rules*, 2015; Vehtari,
    Gelman, Gabry, *Practical Bayesian model evaluation using leave-one-out cross-validation and
    WAIC*, 2017; Yao et al., *Using stacking to average Bayesian predictive distributions*, 2018.

    **Example**

    >>> import jax, jax.numpy as jnp
    >>> import numpyro
    >>> import numpyro_ebm as ebm
    >>> def bits(data):
    ...     logit = numpyro.param("logit", 0.0)
    ...     with numpyro.plate("data", len(data)):
    ...         v = numpyro.sample("v", ebm.Counting(event_shape=(3,)), obs=data)
    ...         ebm.energy("E", -logit * jnp.sum(v, -1))
    >>> data = jax.random.bernoulli(jax.random.key(0), 0.7, (200, 3)).astype(int)
    >>> models = {"fair": (bits, {"logit": 0.0}), "right": (bits, {"logit": jnp.log(7 / 3)})}
    >>> table = ebm.compare(models, data)
    >>> list(table.index), bool(table.elpd_diff["fair"] < -2 * table.dse["fair"])
    (['right', 'fair'], True)
    >>> local = ebm.compare(
    ...     models, data, score="pseudo_likelihood"
    ... )  # the same for independent bits
    >>> bool(abs(local.score_diff["fair"] - table.elpd_diff["fair"]) < 1e-3)
    True
    """
    if not isinstance(models, Mapping) or not models:
        raise ModelError(
            "compare: `models` must be a dict of models by name, such as "
            '`{"small": (model, fit), "large": (other, other_fit)}`, got '
            f"{models!r}."
        )
    if any(map(is_of_posterior, models.values())):
        return compare_posteriors(models, args, kwargs, score)
    rule = _rule(score)
    key = default_key() if rng_key is None else rng_key
    found = {}
    for i, (name, entry) in enumerate(models.items()):
        own = jax.random.fold_in(key, i) if rule is None else key  # the same slices for all
        try:
            found[name] = _scores(own, entry, rule, args, kwargs, check_integrable, options or {})
            _check_finite_scores(found[name])
        except ModelError as error:
            raise ModelError(f"compare, model '{name}': {error}") from None
    check_comparable(found, rule is None)
    return comparison_table(
        found, "log" if rule is None else _name_of_rule(score, rule), rule is None
    )


def _rule(score):
    """The objective whose loss is the score; ``None`` for log-likelihoods."""
    if score is None:
        return None
    rule = RULES[score]() if isinstance(score, str) and score in RULES else score
    if not isinstance(rule, Objective) or not rule.is_scoring_rule:
        raise ModelError(
            f"compare: `score` must be {', '.join(map(repr, RULES))}, or an objective "
            "that is a proper scoring rule (ScoreMatching, SlicedScoreMatching, "
            "PseudoLikelihood, RatioMatching, DiscreteFisher, MinimumProbabilityFlow), or None for "
            f"log-likelihoods; got {score!r}."
        )
    return rule


def _name_of_rule(score, rule):
    return score if isinstance(score, str) else type(rule).__name__


def _scores(rng_key, entry, rule, args, kwargs, check_integrable, options):
    if isinstance(entry, SVIRunResult):
        raise ModelError("a fit does not know its model. Give both, `(model, fit)`.")
    if isinstance(entry, LogLikelihood):
        if rule is not None:
            raise ModelError("log-likelihoods were given, and `score` asks for another score.")
        return scores_of_rows(entry)
    model, params = entry if isinstance(entry, tuple) and len(entry) == 2 else (entry, None)
    params = params.params if isinstance(params, SVIRunResult) else params
    if not callable(model) or not (params is None or isinstance(params, dict)):
        raise ModelError(
            "it must be a fixed model, `(model, fit)`, `(model, params)`, a `LogLikelihood` or a "
            f"posterior, got {entry!r}."
        )
    if not states_energy(model, args, kwargs):
        if rule is not None:
            raise ModelError("it states no energy, and only its log-likelihood is to be had.")
        return plain_scores(
            model if params is None else substitute(model, data=params), args, kwargs
        )
    if params is not None:
        model = _held(model, params, args, kwargs)
    if rule is None:
        return log_scores(rng_key, model, args, kwargs, options)
    return local_scores(rng_key, model, args, kwargs, rule, check_integrable)


def _held(model, params, args, kwargs):
    """The model at parameters: all that it has, of the right shapes."""
    own = read_model(model, args, kwargs).parameters
    missing = sorted(own.keys() - params.keys())
    if missing:
        raise ModelError(
            f"no value for the parameter(s) {', '.join(map(repr, missing))} (there are "
            f"{sorted(params) or 'none'}). Where a guide draws them, give a point, such as the "
            "median of its draws, or a posterior by `normalized`."
        )
    for name, value in own.items():
        pairs = zip(jax.tree.leaves(value), jax.tree.leaves(params[name]), strict=False)
        for x, given in pairs:
            if np.shape(x) != np.shape(given):
                raise ModelError(
                    f"the parameter '{name}' has shape {np.shape(x)}, and {np.shape(given)} was "
                    "given. Draws of a posterior are no parameters: give a point, or the `MCMC`."
                )
    return fixed(model, params)


def _check_finite_scores(scores: RowScores):
    bad = np.flatnonzero(~np.isfinite(scores.values))
    if len(bad):
        raise ModelError(
            f"its score of {len(bad)} rows, the first of them row {bad[0]}, is not finite "
            f"({scores.values[bad[0]]}). Are they on its support, and is its energy finite there?"
        )
