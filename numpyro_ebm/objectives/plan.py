# SPDX-License-Identifier: Apache-2.0
"""What a run finds out once about its model, guide and objective, and needs at every batch."""

from typing import Any, NamedTuple

import jax

from numpyro_ebm.guides.guide import Guide
from numpyro_ebm.marginals import Marginal, choose
from numpyro_ebm.model import provenance
from numpyro_ebm.model.arguments import Arguments
from numpyro_ebm.model.reading import read_model
from numpyro_ebm.model.row_model import RowModel
from numpyro_ebm.model.traced_model import TracedModel, trace_model
from numpyro_ebm.types import Model, Params, SiteValues

__all__ = ["Plan", "Problem", "make_plan"]


class Problem(NamedTuple):
    """One round of learning: a batch, the point at which the model is evaluated, and what for.

    - **row_model** - the model, read at the batch.
    - **guide** - the guide, or ``None``.
    - **marginal** - the way the latent sites are integrated out.
    - **unconstrained** - the visible values the objective uses (noised, for denoising ones), by
      site name.
    - **noise** - what the objective needs to remember of how it made them.
    - **row_weights** - weights of the rows in the guide's loss, of shape (rows,), or ``None``.
    """

    row_model: RowModel
    guide: Guide | None
    marginal: Marginal
    unconstrained: SiteValues
    noise: Any = None
    row_weights: jax.Array | None = None


class Plan(NamedTuple):
    """A model, a guide and an objective that go together. Made by :func:`make_plan`.

    - **objective, model** - the objective and the model.
    - **traced** - the model, where it was checked.
    - **marginal** - the way the latent sites are integrated out.
    - **covariates, arguments** - what was found out about the model's arguments; see
      :class:`~numpyro_ebm.model.row_model.RowModel`.
    """

    objective: Any
    model: Model
    traced: TracedModel
    marginal: Marginal
    covariates: list[str]
    arguments: dict[str, str]

    def at(self, arguments: Arguments, params: Params) -> "Plan":
        """The same plan, with the model checked at other arguments."""
        row_model = read_model(self.model, arguments.args, arguments.kwargs, params)
        self.objective.check_sites(row_model)
        return self._replace(
            traced=row_model.traced,
            covariates=row_model.covariates,
            arguments=row_model.arguments,
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
        return self.place(key_perturb, row_model, guide)

    def place(self, rng_key: jax.Array, row_model: RowModel, guide: Model | None) -> Problem:
        """Place the batch at which a model was read."""
        reader = _read_guide(guide, row_model)
        return Problem(
            row_model, reader, self.marginal, *self.objective.perturb(rng_key, row_model)
        )


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
    return Plan(
        objective,
        row_model.model,
        row_model.traced,
        marginal,
        row_model.covariates,
        row_model.arguments,
    )


def _read_guide(guide, row_model):
    return None if guide is None else Guide(guide, row_model, row_model.args, row_model.kwargs)
