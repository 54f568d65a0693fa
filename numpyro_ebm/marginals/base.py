# SPDX-License-Identifier: Apache-2.0
"""What a marginal offers to an objective, whatever way it integrates the latent sites out."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from numpyro_ebm.errors import ModelError
from numpyro_ebm.guides.guide import Guide
from numpyro_ebm.model.row_model import RowModel
from numpyro_ebm.signatures import Checked
from numpyro_ebm.types import LogDensity, Params, SiteValues

__all__ = ["Estimate", "ExactMarginal", "Marginal", "resampled_particle", "score_of"]


class Estimate(NamedTuple):
    """The marginal log p̃(v; θ) = log ∫ p̃(v, h; θ) dh of every row, near one point v.

    Both functions take unconstrained visible values u as a dict by site name, v = T(u), and
    include ``log |dT/du|``.

    - **log_density** - ``(params, u) -> (rows,)``. Its derivatives in u and θ are unbiased (or
      exact) up to the order the objective asked for; its value is what the
      marginal's ``value`` says.
    - **score** - ``u -> dict``: ∇_u log p̃; for a Monte Carlo marginal from particles independent
      of those of ``log_density``, and a constant in θ. A product of the two is therefore unbiased.
    """

    log_density: Callable[..., jax.Array]
    score: Callable[..., Any]


class Marginal(Checked, ABC):
    """Base class of the ways to integrate h out of p̃(v, h; θ).

    - **needs_guide** - whether it draws from a guide q(h | v).
    - **value** - what the value of ``log_density`` is: ``"exact"``, log p̃(v); ``"bound"``, a lower
      bound of it in the mean; or ``None``, nothing: only its derivatives mean something.
    - **corrects_guide** - whether importance weights make up for any guide, so that one which
      does not look at v may serve.
    - **has_state** - whether something of every row is kept from round to round.
    """

    needs_guide = False
    value: str | None = "exact"
    corrects_guide = False
    has_state = False

    @abstractmethod
    def check(self, row_model: RowModel, guide: Guide | None, order: int) -> None:
        """Raise :class:`~numpyro_ebm.errors.ModelError` if this marginal cannot serve.

        :param row_model: the model's :class:`~numpyro_ebm.model.row_model.RowModel`.
        :param guide: the :class:`~numpyro_ebm.guides.guide.Guide`, or ``None``.
        :param int order: how many derivatives of log p̃ the objective's gradient takes.
        """

    @abstractmethod
    def bind(
        self,
        rng_key: jax.Array,
        row_model: RowModel,
        guide: Guide | None,
        params: Params,
        unconstrained: SiteValues,
        *,
        order: int = 2,
    ) -> Estimate:
        """Estimate the marginal near given visible values.

        :param rng_key: key of the particles.
        :param row_model: the model's :class:`~numpyro_ebm.model.row_model.RowModel`.
        :param guide: the :class:`~numpyro_ebm.guides.guide.Guide`, or ``None``.
        :param dict params: parameter values of the model and the guide.
        :param dict unconstrained: the visible values, in unconstrained coordinates.
        :param int order: as in :meth:`check`.
        :return: an :class:`Estimate`.
        """

    def init_state(
        self, rng_key: jax.Array, row_model: RowModel, params: Params, rows: Any = None
    ) -> Any:
        """What is kept of every row, at the start; a pytree with rows leading, or ``None``.

        :param rows: which rows of the data the batch has, where that is known.
        """
        return None

    def advance(
        self,
        rng_key: jax.Array,
        row_model: RowModel,
        params: Params,
        state: Any,
        rows: Any = None,
    ) -> tuple["Marginal", Any]:
        """The marginal as it is for a round, and what is kept after it."""
        return self, state

    def held(self) -> SiteValues:
        """Unconstrained latent values of every row, near the posterior, if any are kept."""
        return {}

    def draw_latent(
        self,
        rng_key: jax.Array,
        row_model: RowModel,
        guide: Guide,
        params: Params,
        unconstrained: SiteValues,
    ) -> SiteValues:
        """One draw of the latent sites of every row, as near the posterior as :meth:`bind` gets.

        :param rng_key: random key.
        :param row_model: the model's :class:`~numpyro_ebm.model.row_model.RowModel`.
        :param guide: the :class:`~numpyro_ebm.guides.guide.Guide`.
        :param dict params: parameter values of the model and the guide.
        :param dict unconstrained: the visible values, in unconstrained coordinates.
        :return: dict of values by name, constants under differentiation.
        """
        visible, _ = row_model.constrain(unconstrained)
        return {name: x[0] for name, x in guide.draw(rng_key, params, visible, 1).items()}

    def required_guide(self, row_model: RowModel, guide: Guide | None) -> Guide:
        """The guide of a marginal that draws from one.

        :raises ModelError: if the model has no latent sites, or there is no guide.
        """
        who = type(self).__name__
        if not row_model.latent:
            raise ModelError(f"{who} is for models with latent sites; use `Exact()` for this one.")
        if guide is None:
            raise ModelError(
                f"{who} needs a guide q(h | v) for the latent site(s) {sorted(row_model.latent)}: "
                "a NumPyro function with the model's arguments that samples them."
            )
        return guide

    def __repr__(self):
        options = ", ".join(f"{k}={v!r}" for k, v in vars(self).items() if not k.startswith("_"))
        return f"{type(self).__name__}({options})"


class ExactMarginal(Marginal):
    """Base class of the marginals that give log p̃(v; θ) itself, without a guide.

    A subclass says which latent sites it covers, what is left of the row log-joint without them,
    and how they are drawn given the other sites. Where it stands in ``EXACT`` of
    :mod:`numpyro_ebm.marginals`, it serves objectives, kernels, :func:`~numpyro_ebm.sample`, log Z,
    posteriors and diagnostics.
    """

    @abstractmethod
    def why_not(self, row_model: RowModel) -> str | None:
        """Why the latent sites of a model are not covered: a sentence, or ``None``."""

    @abstractmethod
    def log_density(self, row_model: RowModel, params: Params, values: SiteValues) -> jax.Array:
        """log p̃ of every row at given values of the other sites, of shape (rows,)."""

    @abstractmethod
    def conditional(
        self, row_model: RowModel, params: Params, values: SiteValues
    ) -> Callable[[jax.Array], SiteValues]:
        """The law of the latent sites given the values of the others.

        :return: a function that maps a key to one draw, a dict of values by name.
        """

    def num_states(self, row_model: RowModel) -> float:
        """How many joint states of latent sites the log-density of a row sums over."""
        return 1

    def draw(
        self,
        rng_key: jax.Array,
        row_model: RowModel,
        params: Params,
        values: SiteValues,
        num_draws: int,
    ) -> SiteValues:
        """Exact draws of the latent sites, one for each value of the other sites.

        :param dict values: values of the other sites, draws leading; empty if there are none.
        :param int num_draws: how many draws.
        :return: dict of values of the latent sites, draws leading.
        """
        keys = jax.random.split(rng_key, num_draws)
        if not values:
            return lax.map(self.conditional(row_model, params, {}), keys)
        # One draw at a time: all states of all rows are in memory at once.
        return lax.map(lambda x: self.conditional(row_model, params, x[1])(x[0]), (keys, values))

    def unconstrained_log_density(
        self, row_model: RowModel, params: Params, unconstrained: SiteValues
    ) -> jax.Array:
        """log p̃ of every row in unconstrained coordinates, log-Jacobian included."""
        values, log_det = row_model.constrain(unconstrained)
        return self.log_density(row_model, params, values) + log_det

    def check(self, row_model: RowModel, guide: Guide | None, order: int) -> None:
        reason = row_model.remember(self, lambda: self.why_not(row_model))
        if reason:
            raise ModelError(reason)

    def bind(
        self,
        rng_key: jax.Array,
        row_model: RowModel,
        guide: Guide | None,
        params: Params,
        unconstrained: SiteValues,
        *,
        order: int = 2,
    ) -> Estimate:
        self.check(row_model, guide, order)

        def log_density(params, unconstrained):
            return self.unconstrained_log_density(row_model, params, unconstrained)

        return Estimate(log_density, score_of(log_density, params))


def score_of(log_density: LogDensity, params: Params) -> Callable[[SiteValues], SiteValues]:
    """The score of a row log-density."""

    def score(unconstrained):
        total = lambda u: jnp.sum(log_density(params, u))  # noqa: E731
        return jax.grad(total)(unconstrained)

    return score


def resampled_particle(
    rng_key: jax.Array,
    row_model: RowModel,
    guide: Guide,
    params: Params,
    unconstrained: SiteValues,
    num_particles: int,
) -> SiteValues:
    """One of some particles of a guide for every row, drawn by their importance weights.

    The arguments are those of :meth:`Marginal.draw_latent`.
    """
    key_draw, key_choose = jax.random.split(rng_key)
    visible, _ = row_model.constrain(unconstrained)
    latent = guide.draw(key_draw, params, visible, num_particles)

    def log_weight(h):
        log_joint = row_model.unconstrained_log_density(params, unconstrained, h)
        return log_joint - guide.log_density(params, visible, h)

    index = jax.random.categorical(key_choose, jax.vmap(log_weight)(latent), axis=0)
    rows, chosen = jnp.arange(row_model.num_rows), {}
    for name, x in latent.items():
        axis = jnp.ndim(x) + row_model.dim - row_model.latent[name].event_dim
        chosen[name] = jnp.moveaxis(jnp.moveaxis(x, axis, 1)[index, rows], 0, axis - 1)
    return chosen
