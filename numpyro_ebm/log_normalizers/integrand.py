# SPDX-License-Identifier: Apache-2.0
r"""A fixed model as the density whose integral is sought: positions in, log-densities out.

.. math:: Z = \int \tilde p(x)\, dx

A position is a dict of arrays with points leading: real sites in unconstrained coordinates (the
log-Jacobian is part of the density), discrete sites in their values. Rows of the data plate that
share their log Z are so many points evaluated at once; where every row has a log Z of its own,
point i belongs to row i modulo their number.
"""

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.distributions import ImproperUniform, MaskedDistribution

from numpyro_ebm._compat import Tracer
from numpyro_ebm.language.distributions import Counting
from numpyro_ebm.language.handlers import uncondition
from numpyro_ebm.language.sites import layers, without_masks
from numpyro_ebm.log_normalizers.shared_rows import (
    placeholder_rows,
    read_one_row,
)
from numpyro_ebm.marginals import exact_marginal
from numpyro_ebm.marginals.base import ExactMarginal
from numpyro_ebm.model.finite_supports import support_values
from numpyro_ebm.model.reading import read_fixed_model, read_model
from numpyro_ebm.model.row_groups import in_groups
from numpyro_ebm.model.row_model import RowModel
from numpyro_ebm.program.compilation import constants_as_arguments
from numpyro_ebm.types import Model, SiteValues

__all__ = ["Integrand", "read_integrand"]


class Integrand:
    """A fixed model as an unnormalised density. Made by :func:`read_integrand`.

    - **row_model** - the model, its visible sites the unobserved real ones, its latent sites the
      unobserved discrete ones.
    - **is_shared** - whether all rows share their log Z.
    - **num_problems** - 1 if they do, else the number of rows.
    - **real, discrete** - names of the sites that are coordinates of a position.
    - **marginal** - the exact marginal that sums discrete sites out of the density, or ``None``.
    - **proper** - names of the sites whose own distribution is proper.
    - **data** - observed values of unconditioned real sites, unconstrained, rows leading.
    """

    def __init__(
        self,
        row_model: RowModel,
        is_shared: bool,
        data: SiteValues,
        marginal: ExactMarginal | None = None,
    ):
        self.row_model, self.is_shared, self.data = row_model, is_shared, data
        self.num_problems = 1 if is_shared else row_model.num_rows
        self.marginal = marginal
        self.real = tuple(sorted(row_model.visible))
        self.discrete = () if marginal else tuple(sorted(row_model.latent))
        self.proper = _proper_sites(row_model, (*self.real, *self.discrete))

    def sum_out(self, names: Sequence[str] | None = None) -> "Integrand":
        """The same with sites summed or integrated out; raises ModelError if that is too much.

        :param names: names of the sites; the discrete ones if ``None``.
        """
        row_model = self.row_model if names is None else self.row_model.with_latent(names)
        marginal = exact_marginal(row_model)
        data = {name: x for name, x in self.data.items() if name in row_model.visible}
        return Integrand(row_model, self.is_shared, data, marginal)

    @cached_property
    def is_traced(self) -> bool:
        """Whether log-densities depend on traced arrays, in which somebody may differentiate."""
        like = self.placeholder(self.row_model.num_rows)
        _, constants = constants_as_arguments(self.log_densities, like)
        return any(isinstance(x, Tracer) for x in constants)

    @property
    def flat_real(self) -> tuple[str, ...]:
        """Names of the real sites with an improper base measure."""
        return tuple(name for name in self.real if name not in self.proper)

    @property
    def num_real(self) -> int:
        """Number of real coordinates."""
        return len(self.coordinate_names())

    def coordinate_names(self) -> list[str]:
        """The site of every real coordinate, sites in the order of ``real``."""
        return [name for name in self.real for _ in range(self.size(name))]

    def size(self, name: str) -> int:
        """Number of coordinates of a site in a row."""
        return int(np.size(self._one_point[name]))

    def values(self, name: str) -> np.ndarray:
        """The values of one coordinate of a discrete site."""
        return support_values(self.row_model.latent[name], "log_normalizer")

    @cached_property
    def _one_point(self):
        shapes = jax.eval_shape(lambda: placeholder_rows(self.row_model))
        return {
            name: np.zeros(x.shape[1:], x.dtype)
            if name in self.real
            else np.full(x.shape[1:], self.values(name)[0], x.dtype)
            for name, x in shapes.items()
            if name in (*self.real, *self.discrete)
        }

    def placeholder(self, num: int) -> SiteValues:
        """A position of ``num`` points."""
        return {k: jnp.broadcast_to(x, (num, *x.shape)) for k, x in self._one_point.items()}

    def log_density(self, position: SiteValues) -> jax.Array:
        """The unnormalised log-density, of shape (n,)."""
        return self.over_rows(lambda rows: self._log_densities(rows)[1])(position)

    def log_densities(self, position: SiteValues) -> tuple[jax.Array, jax.Array]:
        """Log-densities of the proper part of the base measure and of the model, (n,) each.

        The flat measure of discrete sites counts as uniform.
        """
        return self.over_rows(self._log_densities)(position)

    def _log_densities(self, rows):
        row_model = self.row_model
        z = row_model.from_rows(rows)
        real = {k: x for k, x in z.items() if k in self.real}
        proper, log_det = row_model.constrain({k: real[k] for k in real if k in self.proper})
        flat, log_det_flat = row_model.constrain({k: real[k] for k in real if k not in self.proper})
        values = {**{k: x for k, x in z.items() if k in self.discrete}, **flat, **proper}
        shape = (row_model.num_rows,)
        if self.marginal:
            density = self.marginal.log_density(row_model, {}, values) + log_det + log_det_flat
            return jnp.zeros(shape, density.dtype), jnp.broadcast_to(density, shape)
        densities = row_model.terms(values)
        density = sum(densities.values()) + log_det + log_det_flat
        base = sum((densities[name] for name in sorted(self.proper)), log_det)
        for name in self.discrete:
            if name not in self.proper:
                base = base - self.size(name) * np.log(len(self.values(name)))
        density = jnp.broadcast_to(density, shape)
        return jnp.broadcast_to(base, shape).astype(density.dtype), density

    def over_rows(
        self, fn: Callable[..., Any], keys: jax.Array | None = None
    ) -> Callable[..., Any]:
        """Turn a function of one plate of rows into one of any number of points.

        :param fn: maps positions with rows leading (and a key) to arrays with rows leading.
        :param keys: a key for every plate of rows, if ``fn`` takes one.
        :return: a function of a position, and of the number of points where the position is empty.
        """
        return partial(in_groups, fn, self.row_model.num_rows, keys=keys)


def read_integrand(
    rng_key: jax.Array,
    model: Model,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    unconditioned: bool = True,
    is_shared: bool | None = None,
) -> Integrand:
    """Read a fixed model for its log Z.

    :param rng_key: random key.
    :param model: a model with fixed parameters.
    :param tuple args: its arguments.
    :param dict kwargs: its keyword arguments.
    :param bool unconditioned: whether observed sites are integrated over as well; else they keep
        their values, and every row has a log Z of its own.
    :param is_shared: whether all rows share their log Z; found by the analysis of the rows if
        ``None``.
    :return: an :class:`Integrand`.
    :raises ModelError: if the model has free parameters, or nothing to integrate over.
    """
    seen = read_model(model, args, kwargs, rng_key=rng_key)
    if seen.parameters or not seen.is_fixed:
        read_fixed_model(model, args, kwargs)  # raises, and says why
    if not unconditioned:
        return Integrand(read_fixed_model(model, args, kwargs), False, {})
    data = {
        name: x
        for name, x in seen.to_rows(seen.unconstrain_visible()).items()
        if not seen.visible[name].is_discrete
    }
    free = uncondition(seen.model, tuple(seen.visible))
    row_model = read_fixed_model(free, args, kwargs)
    if is_shared is None:
        is_shared = not row_model.covariates
    if is_shared and row_model.num_rows > 1:
        row_model = read_one_row(free, seen.arguments, args, kwargs) or row_model
    return Integrand(row_model, is_shared, data)


def _proper_sites(row_model, names):
    """Which of the named sites have a proper distribution, that counts once."""
    model_trace = row_model.trace_at({name: site.value for name, site in row_model.sites.items()})

    def is_proper(site):
        improper = MaskedDistribution | ImproperUniform | Counting
        is_flat = any(isinstance(x, improper) for x in layers(without_masks(site["fn"])))
        return not is_flat

    return frozenset(name for name in names if is_proper(model_trace[name]))
