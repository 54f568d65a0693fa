# SPDX-License-Identifier: Apache-2.0
"""What a marginal offers to an objective, whatever way it integrates the latent sites out."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from numpyro_ebm.errors import ModelError

__all__ = ["Estimate", "Marginal", "choose"]


class Estimate(NamedTuple):
    """The marginal log p̃(v; θ) = log ∫ p̃(v, h; θ) dh of every row, near one point v.

    Both functions take unconstrained visible values u as a dict by site name, v = T(u), and
    include log |dT/du|.

    - **log_density** - ``(params, u) -> (rows,)``. Its derivatives in u and θ are unbiased (or
      exact) up to the order the objective asked for; its value is what the
      marginal's ``value`` says.
    - **score** - ``u -> dict``: ∇_u log p̃, constant under differentiation and, for a Monte Carlo
      marginal, from particles independent of those of ``log_density``. A product of the two is
      therefore unbiased.
    """

    log_density: Callable
    score: Callable


class Marginal(ABC):
    """Base class of the ways to integrate h out of p̃(v, h; θ).

    - **needs_guide** - whether it draws from a guide q(h | v).
    - **value** - what the value of ``log_density`` is: ``"exact"``, log p̃(v); ``"bound"``, a lower
      bound of it in the mean; or ``None``, nothing: only its derivatives mean something.
    - **corrects_guide** - whether importance weights make up for any guide, so that one which
      does not look at v may serve.
    """

    needs_guide = False
    value = "exact"
    corrects_guide = False

    @abstractmethod
    def check(self, row_model, guide, order):
        """Raise :class:`~numpyro_ebm.errors.ModelError` if this marginal cannot serve.

        :param row_model: the model's :class:`~numpyro_ebm.model.row_model.RowModel`.
        :param guide: the :class:`~numpyro_ebm.guides.guide.Guide`, or ``None``.
        :param int order: how many derivatives of log p̃ the objective's gradient takes.
        """

    @abstractmethod
    def bind(self, rng_key, row_model, guide, params, unconstrained, *, order=2):
        """Estimate the marginal near given visible values.

        :param rng_key: key of the particles.
        :param row_model: the model's :class:`~numpyro_ebm.model.row_model.RowModel`.
        :param guide: the :class:`~numpyro_ebm.guides.guide.Guide`, or ``None``.
        :param dict params: parameter values of the model and the guide.
        :param dict unconstrained: the visible values, in unconstrained coordinates.
        :param int order: as in :meth:`check`.
        :return: an :class:`Estimate`.
        """

    def __repr__(self):
        options = ", ".join(f"{k}={v!r}" for k, v in vars(self).items() if not k.startswith("_"))
        return f"{type(self).__name__}({options})"


def score_of(log_density, params):
    """The score of a row log-density, constant under differentiation."""

    def score(unconstrained):
        total = lambda u: jnp.sum(log_density(params, u))  # noqa: E731
        return jax.lax.stop_gradient(jax.grad(total)(unconstrained))

    return score


def choose(row_model):
    """The default marginal of a model: exact if there is one, else the user has to choose.

    :raises ModelError: if the model has latent sites that no exact marginal covers.
    """
    from numpyro_ebm.marginals.enumerated import Enumerated
    from numpyro_ebm.marginals.exact import Exact

    if not row_model.latent:
        return Exact()
    enumerated = Enumerated()
    try:
        enumerated.check(row_model, None, 2)
    except ModelError as error:
        raise ModelError(
            f"The model has the latent site(s) {', '.join(map(repr, row_model.latent))}, and no "
            "exact marginal covers them. Pass `marginal=VaGES(num_particles=2)` with a guide q(h | "
            f"v). ({error})"
        ) from None
    return enumerated
