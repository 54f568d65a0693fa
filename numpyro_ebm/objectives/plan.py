# SPDX-License-Identifier: Apache-2.0
"""What a run finds out once about its model, guide and objective, and needs at every batch."""

from typing import Any, NamedTuple

import jax

from numpyro_ebm.errors import ModelError
from numpyro_ebm.guides.guide import Guide
from numpyro_ebm.keys import default_key
from numpyro_ebm.marginals import Marginal, choose, list_exact
from numpyro_ebm.model import provenance
from numpyro_ebm.model.arguments import Arguments
from numpyro_ebm.model.reading import read_model
from numpyro_ebm.model.row_analysis import check_row_argument
from numpyro_ebm.model.row_model import RowModel
from numpyro_ebm.model.traced_model import TracedModel, trace_model
from numpyro_ebm.types import Model, Params, SiteValues

__all__ = ["BatchRows", "Plan", "Problem", "make_plan"]

CONDITION_STREAM = 0x5167A
"""Folded into the key of a batch for arguments of the objective's own."""


class BatchRows(NamedTuple):
    """Which rows of the data a batch has.

    - **numbers** - which they are, (rows,).
    - **total** - how many rows the data have.
    """

    numbers: jax.Array
    total: int


class Problem(NamedTuple):
    """One round of learning: a batch, the point at which the model is evaluated, and what for.

    - **row_model** - the model, read at the batch.
    - **guide** - the guide, or ``None``.
    - **marginal** - the way the latent sites are integrated out.
    - **unconstrained** - the visible values the objective uses (noised, for denoising ones), by
      site name.
    - **noise** - what the objective needs to remember of how it made them.
    - **row_weights** - weights of the rows in the guide's loss, of shape (rows,), or ``None``.
    - **parts** - the problems of the parts of a sum.
    - **rows** - which rows of the data the batch has, where the caller knows.
    """

    row_model: RowModel
    guide: Guide | None
    marginal: Marginal
    unconstrained: SiteValues
    noise: Any = None
    row_weights: jax.Array | None = None
    parts: tuple["Problem", ...] = ()
    rows: BatchRows | None = None

    def at_rows(self, rows: BatchRows | None) -> "Problem":
        """The same problem, and those of its parts, of a batch with these rows."""
        return self._replace(rows=rows, parts=tuple(part.at_rows(rows) for part in self.parts))


class Plan(NamedTuple):
    """A model, a guide and an objective that go together. Made by :func:`make_plan`.

    - **objective, model** - the objective and the model.
    - **traced** - the model, where it was checked.
    - **marginal** - the way the latent sites are integrated out.
    - **covariates, arguments** - what was found out about the model's arguments; see
      :class:`~numpyro_ebm.model.row_model.RowModel`.
    - **parts** - the plans of the parts of a sum.
    - **takes_guide** - whether the guide draws the latent sites of this part.
    - **conditioned** - the model where it was checked at arguments of the objective's own, if any:
      what is ``traced, covariates, arguments`` above.
    """

    objective: Any
    model: Model
    traced: TracedModel
    marginal: Marginal
    covariates: list[str]
    arguments: dict[str, str]
    parts: tuple["Plan", ...] = ()
    takes_guide: bool = True
    conditioned: tuple[TracedModel, list[str], dict[str, str]] | None = None

    def at(self, arguments: Arguments, params: Params) -> "Plan":
        """The same plan, with the model checked at other arguments."""
        row_model = read_model(self.model, arguments.args, arguments.kwargs, params)
        self.objective.check_sites(row_model)
        inner = _conditioned(default_key(), self.objective, row_model, params)
        return self._replace(
            traced=row_model.traced,
            covariates=row_model.covariates,
            arguments=row_model.arguments,
            conditioned=None if inner is row_model else _found_in(inner),
            parts=tuple(part.at(arguments, params) for part in self.parts),
        )

    def problem(
        self,
        rng_key: jax.Array,
        params: Params,
        guide: Model | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Problem:
        """Place a batch.

        Nothing is checked again but the data themselves, unless arguments that are not arrays have
        changed: they may make the model another one.

        :param rng_key: random key.
        :param dict params: values of all parameters, by name.
        :param guide: the guide, or ``None``.
        :param tuple args: arguments of model and guide.
        :param dict kwargs: keyword arguments of model and guide.
        :return: a :class:`Problem`.
        """
        if not self.traced.arguments.have_form_of(Arguments(args, kwargs)):
            return self.objective.prepare(rng_key, params, self.model, guide, args, kwargs)
        key_read, key_perturb = jax.random.split(rng_key)
        traced = self.traced.rebound(self.model, args, kwargs)
        if traced is None:
            traced = trace_model(self.model, args, kwargs, params)
        row_model = traced.bind(key_read, params)
        row_model.covariates, row_model.arguments = self.covariates, self.arguments
        return self.place(key_perturb, row_model, guide, params)

    def place(
        self, rng_key: jax.Array, row_model: RowModel, guide: Model | None, params: Params
    ) -> Problem:
        """Place the batch at which a model was read, for a sum those of its parts."""
        if not self.parts:
            key_read = jax.random.fold_in(rng_key, CONDITION_STREAM)
            row_model = _conditioned(key_read, self.objective, row_model, params, self.conditioned)
            reader = _read_guide(guide, row_model)
            return Problem(
                row_model, reader, self.marginal, *self.objective.perturb(rng_key, row_model)
            )
        reader = _read_guide(guide, row_model)
        parts = tuple(
            part.problem(
                jax.random.fold_in(rng_key, i),
                params,
                guide if part.takes_guide else None,
                row_model.args,
                row_model.kwargs,
            )
            for i, part in enumerate(self.parts)
        )
        point = self._where_guide_is_fitted(parts)
        unconstrained = {**row_model.unconstrain_visible(), **point.unconstrained}
        return Problem(
            row_model,
            reader,
            self.marginal,
            unconstrained,
            row_weights=point.row_weights,
            parts=parts,
        )

    def _where_guide_is_fitted(self, parts):
        """The problem of a part whose visible values are those of all that draw from the guide."""
        drawing = [i for i, part in enumerate(parts) if part.marginal.needs_guide]
        moving = [i for i in drawing if parts[i].noise is not None]
        if moving and len(drawing) > 1:
            raise ModelError(
                f"{self.objective!r}: {len(drawing)} parts draw from one guide, which is fitted at "
                f"one set of visible values, and {self.parts[moving[0]].objective!r} adds noise to "
                "its own. Let one part draw from the guide and give the others an exact marginal "
                f"({list_exact()}), or take objectives without noise."
            )
        return parts[[*moving, *drawing, 0][0]]


def make_plan(
    rng_key: jax.Array, objective: Any, row_model: RowModel, guide: Model | None, params: Params
) -> Plan:
    """Check that an objective serves a model, and choose a marginal for it.

    :param rng_key: random key of a draw from the guide.
    :param Objective objective: the objective.
    :param RowModel row_model: the model, read and checked.
    :param guide: the guide, or ``None``.
    :param dict params: values of all parameters, by name.
    :return: a :class:`Plan`.
    :raises ModelError: if the model, the guide and the objective do not go together.
    """
    objective.check_sites(row_model)
    parts = tuple(_plan_part(rng_key, x, row_model, guide, params) for x in objective.parts)
    inner = row_model
    if parts:
        marginal = parts[0].marginal
    else:
        inner = _conditioned(rng_key, objective, row_model, params)
        marginal = _choose_marginal(rng_key, objective, inner, guide, params)
    return Plan(
        objective,
        row_model.model,
        row_model.traced,
        marginal,
        row_model.covariates,
        row_model.arguments,
        parts,
        conditioned=None if inner is row_model else _found_in(inner),
    )


def _conditioned(rng_key, objective, row_model, params, known=None):
    """The model at the arguments of the objective's own, if any; not checked where it is known."""
    key_own, key_read = jax.random.split(rng_key)
    own = objective.own_arguments(key_own, row_model)
    if not own:
        return row_model
    model, args, kwargs = row_model.model, row_model.args, {**row_model.kwargs, **own}
    if known is None:
        try:
            inner = read_model(model, args, kwargs, params, rng_key=key_read)
        except (TypeError, ValueError) as error:
            error.add_note(
                f"{type(objective).__name__} gives the model {sorted(own)}, arrays of shape "
                f"({row_model.num_rows},), one value a row."
            )
            raise
        for name in own:
            check_row_argument(inner, name)
        return inner
    traced, covariates, arguments = known
    traced = traced.rebound(model, args, kwargs) or trace_model(model, args, kwargs, params)
    inner = traced.bind(key_read, params)
    inner.covariates, inner.arguments = covariates, arguments
    return inner


def _found_in(row_model):
    return row_model.traced, row_model.covariates, row_model.arguments


def _choose_marginal(rng_key, objective, row_model, guide, params):
    """The marginal of an objective, after model and guide were checked against it."""
    reader = _read_guide(guide, row_model)
    marginal = choose(row_model) if objective.marginal is None else objective.marginal
    objective.check_marginal(marginal)
    marginal.check(row_model, reader, objective.order)
    if guide is not None and reader is not None and row_model.latent:
        reader.check(reader.trace(rng_key, params, row_model.visible_values))
        provenance.check_guide(
            row_model,
            guide,
            params,
            may_ignore_visible=not marginal.needs_guide or marginal.corrects_guide,
        )
    return marginal


def _plan_part(rng_key, part, row_model, guide, params):
    """The plan of a part of a sum, on its own sites of the model."""
    objective = part.objective
    model, sums_out = part.restrict(row_model)
    if model is not row_model.model:
        data = row_model.traced.data
        row_model = read_model(model, row_model.args, row_model.kwargs, data, rng_key=rng_key)
    draws = objective.marginal is not None and objective.marginal.needs_guide
    takes_guide = draws or not sums_out  # else it has more latent sites than the guide
    plan = make_plan(rng_key, objective, row_model, guide if takes_guide else None, params)
    return plan._replace(takes_guide=takes_guide)


def _read_guide(guide, row_model):
    return None if guide is None else Guide(guide, row_model, row_model.args, row_model.kwargs)
