# SPDX-License-Identifier: Apache-2.0
"""The parts of a sum of objectives: each an objective with a weight, on sites of its own."""

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, Self

import jax.numpy as jnp

from numpyro_ebm.errors import ModelError, check_not_negative
from numpyro_ebm.language.handlers import restricted
from numpyro_ebm.model.row_model import RowModel
from numpyro_ebm.types import Model

__all__ = ["Part", "Term"]


class Part(NamedTuple):
    """A part of a sum.

    - **objective, weight** - the objective, and its weight.
    - **sites** - names of the visible sites it learns; all that are not given, if empty.
    - **given** - names of the visible sites that are held at the data.
    """

    objective: Any
    weight: Any = 1.0
    sites: tuple[str, ...] = ()
    given: tuple[str, ...] = ()

    def scaled(self, weight: Any) -> Self:
        """The same part, with its weight multiplied.

        :raises ModelError: if the weight is no finite, non-negative number.
        """
        check_not_negative("An objective's weight", weight=weight)
        if jnp.ndim(weight):
            raise ModelError(
                f"An objective's weight: `weight` must be a number, got {weight!r}. Weights of "
                "rows are `numpyro.handlers.scale` around the data plate."
            )
        return self._replace(weight=weight * self.weight)

    def on(self, sites: Sequence[str], given: str | Sequence[str]) -> Self:
        """The same part, on these sites given those.

        :raises ModelError: if it is on some sites already, or a name is on both sides.
        """
        if self.sites or self.given:
            raise ModelError(f"{self!r} is on some sites already: say all of them at once.")
        given = (given,) if isinstance(given, str) else tuple(given)
        if not all(isinstance(name, str) for name in (*sites, *given)) or {*sites} & {*given}:
            raise ModelError(
                "`on(*sites, given=...)` takes names of visible sites, none on both sides, got "
                f"{sites!r} and given={given!r}."
            )
        return self._replace(sites=tuple(sites), given=given)

    def restrict(self, row_model: RowModel) -> tuple[Model, bool]:
        """The model of this part, and whether visible sites are summed out in it.

        :param RowModel row_model: the model of the sum.
        :raises ModelError: if a name is not that of a visible site, or none is left to learn.
        """
        if not self.sites and not self.given:
            return row_model.model, False
        given = [_visible_name(row_model, name) for name in self.given]
        sites = [_visible_name(row_model, name) for name in self.sites]
        sites = sites or [name for name in row_model.visible if name not in given]
        if not sites:
            raise ModelError(f"{self!r}: all visible sites are given, and nothing is learned.")
        summed = row_model.visible.keys() - {*sites, *given}
        return restricted(row_model.model, given, summed), bool(summed)

    def __repr__(self):
        weight = "" if isinstance(self.weight, float) and self.weight == 1 else f"{self.weight} * "
        names = list(map(repr, self.sites))
        if self.given:
            names.append(f"given={list(self.given)}")
        return f"{weight}{self.objective!r}" + (f".on({', '.join(names)})" if names else "")


class Term:
    """What may be a term of a sum: the operators of objectives.

    - **parts** - the parts of a sum; empty for other objectives.
    - **sum_of** - the class of sums.
    """

    parts: tuple[Part, ...] = ()
    sum_of: ClassVar[Any] = None
    __array_ufunc__ = None  # a number of NumPy leaves the product to the objective

    def on(self, *sites: str, given: str | Sequence[str] = ()) -> Any:
        r"""Restrict this objective to some of the visible sites of a model.

        .. math:: p(v_A \mid v_B; θ) \propto \sum_{v_C} \tilde p(v_A, v_B, v_C; θ)

        :param sites: names of the visible sites A that are learned; all but those given if none.
        :param given: names of the visible sites B that are held at the data. All others, C, are
            integrated out as latent sites are.
        :return: a :class:`~numpyro_ebm.WeightedSum` of this part.
        :raises ModelError: when used, if a name is not that of a visible site.
        """
        return self.sum_of([part.on(sites, given) for part in self._as_parts()])

    def __add__(self, other: Any) -> Any:
        if not isinstance(other, Term):
            raise ModelError(
                f"An objective and {other!r} do not add up. The terms of a sum are objectives, "
                "`0.5 * A + B`; what is added to an energy belongs in the model."
            )
        return self.sum_of([*self._as_parts(), *other._as_parts()])

    def __radd__(self, other: Any) -> Any:
        is_start = isinstance(other, int) and other == 0  # of Python's `sum`
        return self if is_start else self + other

    def __mul__(self, weight: Any) -> Any:
        return self.sum_of([part.scaled(weight) for part in self._as_parts()])

    __rmul__ = __mul__

    def _as_parts(self):
        return self.parts or (Part(self),)


def _visible_name(row_model, name):
    """The visible site of this name, or the observed half of one with an `obs_mask`."""
    half = f"{name}_observed"
    if name in row_model.visible:
        return name
    if half in row_model.visible and half in row_model.obs_masked:
        return half
    raise ModelError(
        f"`on` names the site '{name}', and the visible sites are {sorted(row_model.visible)}."
    )
