# SPDX-License-Identifier: Apache-2.0
"""Symmetric kernels q(y | x) that move a row, over sites of any kind."""

import math
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient

from numpyro_ebm._compat import not_jax_tracer
from numpyro_ebm.errors import ModelError, check_fraction
from numpyro_ebm.model.finite_supports import (
    check_values,
    lowest_count,
    shifted,
    support_values,
)
from numpyro_ebm.model.row_model import RowModel
from numpyro_ebm.types import SiteValues

__all__ = ["Perturbation", "SymmetricKernel"]

Perturbation: TypeAlias = Literal["uniform", "cyclical", "ordinal"]
"""Where a discrete coordinate goes."""

PERTURBATIONS = ("uniform", "cyclical", "ordinal")


class SymmetricKernel:
    """Gaussian noise on continuous sites, other values on discrete ones: q(y | x) = q(x | y).

    :param str owner: the objective, for messages.
    :param noise_scale: standard deviation of the noise, in unconstrained coordinates; ``None``
        for that of the other rows, coordinate by coordinate, over the root of their number.
    :param flip_probability: the probability that a discrete coordinate moves, each by itself;
        ``None`` for exactly one of each row, chosen at random.
    :param str perturbation: to any other value (``"uniform"``), or one place up or down: round and
        round (``"cyclical"``) or never beyond the ends (``"ordinal"``, counts too).
    :param default_probability: the ``flip_probability`` that nobody has asked for.
    :raises ModelError: if an option is out of its range.
    """

    def __init__(
        self,
        owner: str,
        noise_scale: float | None,
        flip_probability: float | None,
        perturbation: Perturbation,
        default_probability: float | None = None,
    ):
        if flip_probability is not None:
            check_fraction(owner, flip_probability=flip_probability)
        if perturbation not in PERTURBATIONS:
            raise ModelError(
                f"{owner}: `perturbation` must be one of "
                f"{', '.join(map(repr, PERTURBATIONS))}, got {perturbation!r}."
            )
        self.owner, self.perturbation = owner, perturbation
        self.noise_scale: Any = noise_scale
        self.flip_probability: Any = flip_probability
        given = not not_jax_tracer(flip_probability) or flip_probability != default_probability
        self._of_discrete = [
            *(["flip_probability"] if given else []),
            *(["perturbation"] if perturbation != "uniform" else []),
        ]

    def check_sites(self, row_model: RowModel) -> None:
        """Raise unless all visible sites can be moved, and every option that is given moves one."""
        self._check_options([site.is_discrete for site in row_model.visible.values()])
        for name, site in row_model.visible.items():
            if not site.is_discrete:
                if self.noise_scale is None and row_model.num_rows < 3:
                    raise ModelError(
                        f"{self.owner}: the visible site '{name}' is continuous, and a row moves "
                        "as far as the others of its batch are spread, which takes three rows. "
                        "Say how far it moves by `noise_scale`, in its unconstrained coordinates."
                    )
            elif lowest_count(site) is None:
                check_values(site, self.owner)
            elif self.perturbation != "ordinal":
                raise ModelError(
                    f"{self.owner}: the site '{name}' has infinitely many values. Counts are moved "
                    "one up or down, by `perturbation='ordinal'`."
                )

    def _check_options(self, is_discrete):
        if not any(is_discrete) and self._of_discrete:
            raise ModelError(
                f"{self.owner}: `{self._of_discrete[0]}` is for discrete visible sites, and there "
                "are none, so that it would do nothing. How far rows of real numbers move is "
                "`noise_scale`."
            )
        if all(is_discrete) and self.noise_scale is not None:
            raise ModelError(
                f"{self.owner}: `noise_scale` is for continuous visible sites, and all are "
                "discrete, so that it would do nothing. How many values of a row change is "
                "`flip_probability`, and where they go `perturbation`."
            )

    def draw(self, rng_key: jax.Array, row_model: RowModel, point: SiteValues) -> SiteValues:
        """One draw from q(· | point), the sites independently where coordinates are.

        :param rng_key: random key.
        :param RowModel row_model: the model.
        :param dict point: unconstrained values of the visible sites.
        """
        keys = jax.random.split(rng_key, len(point))
        chosen = self._one_of_each_row(rng_key, row_model, point)
        scales, sites = self._scales(row_model), row_model.visible
        return {
            name: self._moved(key, sites[name], jnp.asarray(x), chosen.get(name), scales.get(name))
            for key, (name, x) in zip(keys, point.items(), strict=True)
        }

    def _one_of_each_row(self, rng_key, row_model, point) -> dict[str, Any]:
        """Which discrete coordinates move, by site, where it is one of each row."""
        if self.flip_probability is not None:
            return {}
        discrete = {k: x for k, x in point.items() if row_model.visible[k].is_discrete}
        rows = row_model.to_rows({k: jnp.asarray(x) for k, x in discrete.items()})
        sizes = {name: x.size // len(x) for name, x in rows.items()}
        total, start, chosen = max(1, sum(sizes.values())), 0, {}
        which = jax.random.randint(
            jax.random.fold_in(rng_key, 1), (row_model.num_rows, 1), 0, total
        )
        for name, x in rows.items():
            here = which == start + jnp.arange(sizes[name])
            chosen[name], start = jnp.reshape(here, x.shape), start + sizes[name]
        return row_model.from_rows(chosen)

    def _scales(self, row_model) -> dict[str, Any]:
        """How far the coordinates of continuous sites move, by site."""
        data = row_model.unconstrain_visible()
        rows = {k: x for k, x in data.items() if not row_model.visible[k].is_discrete}
        if self.noise_scale is not None or not rows:
            return dict.fromkeys(rows, self.noise_scale)
        num = sum(math.prod(jnp.shape(x)) for x in rows.values()) // row_model.num_rows
        rows = row_model.to_rows(rows)
        found = {k: _spread_of_others(x, row_model.row_weights) for k, x in rows.items()}
        return row_model.from_rows({k: x / math.sqrt(num) for k, x in found.items()})

    def _moved(self, rng_key, site, x, moves, scale):
        if not site.is_discrete:
            return x + scale * jax.random.normal(rng_key, x.shape, x.dtype)
        key_move, key_where = jax.random.split(rng_key)
        if moves is None:
            moves = jax.random.bernoulli(key_move, self.flip_probability, x.shape)
        lowest = lowest_count(site)
        if lowest is not None:
            up = jax.random.bernoulli(key_where, 0.5, x.shape)
            x = jnp.asarray(x, jnp.promote_types(x.dtype, jnp.result_type(int)))  # no overflow
            return jnp.where(moves, jnp.maximum(x + jnp.where(up, 1, -1), lowest), x)
        values = support_values(site, self.owner)
        if self.perturbation == "uniform":
            shift = jax.random.randint(key_where, x.shape, 1, len(values))
            return jnp.where(moves, shifted(x, shift, values), x)
        up = jax.random.bernoulli(key_where, 0.5, x.shape)
        other = shifted(x, jnp.where(up, 1, len(values) - 1), values)
        if self.perturbation == "ordinal":  # staying at the ends keeps the kernel symmetric
            end = jnp.where(up, values[-1], values[0])
            moves = moves & (x != end.astype(x.dtype))
        return jnp.where(moves, other, x)


def _spread_of_others(rows, weights):
    """Standard deviation of every coordinate over all rows but the one in whose place it stands.

    With that row among them the kernel would not be symmetric: a row that lies far out is moved
    farther than what comes of it. A coordinate that is the same in all rows moves as the others do.
    """
    weights = jnp.ones(len(rows)) if weights is None else weights
    w = jnp.reshape(weights, (-1,) + (1,) * (jnp.ndim(rows) - 1))
    x = rows - jnp.sum(w * rows, 0) / jnp.sum(w)
    rest = jnp.sum(w) - w
    variance = (jnp.sum(w * x**2, 0) - w * x**2) / rest - (w * x / rest) ** 2
    rounding = 16 * jnp.finfo(x.dtype).eps * jnp.max(jnp.abs(rows), 0)
    same = variance <= rounding**2
    mean = jnp.mean(jnp.where(same, 0.0, variance), tuple(range(1, jnp.ndim(x))), keepdims=True)
    mean = jnp.where(mean > 0, mean, jnp.nan)  # where nothing varies there is no scale
    return stop_gradient(jnp.sqrt(jnp.where(same, mean, variance)))
