# SPDX-License-Identifier: Apache-2.0
r"""Objectives that compare log p̃ at a row with log p̃ at its neighbours, so that log Z cancels.

The neighbours of a row are the states that differ from it in one coordinate: for a coordinate with
K values there are K - 1 of them, of which an objective takes all, or those beside its own. Where
log p̃ is affine in the indicators of every coordinate (:mod:`numpyro_ebm.program.multi_affine`), all
log-ratios are one gradient; otherwise every neighbour is an evaluation of log p̃.
"""

from abc import abstractmethod
from typing import Any

import jax
import jax.numpy as jnp

from numpyro_ebm.errors import ModelError
from numpyro_ebm.keys import default_key
from numpyro_ebm.model.finite_supports import (
    check_values,
    lowest_count,
    shifted,
    support_values,
)
from numpyro_ebm.model.resize import with_rows
from numpyro_ebm.model.row_model import RowModel
from numpyro_ebm.model.row_site import RowSite
from numpyro_ebm.objectives.base import Objective, Problem
from numpyro_ebm.program.multi_affine import multi_affine, tell_general
from numpyro_ebm.types import Params

__all__ = ["NeighbourObjective"]

NEIGHBOURS_AT_ONCE = 64
"""About how many neighbours of every row are evaluated together, which bounds the memory."""


class NeighbourObjective(Objective):
    """A sum over coordinates of a function of log p̃ at the other values of that coordinate."""

    needs = "value"
    order = 1
    adjacent = False  # whether the next and the previous value are all that count

    def check_sites(self, row_model: RowModel) -> None:
        name = type(self).__name__
        self.check_observed(row_model)
        for site in row_model.visible.values():
            if not site.is_discrete:
                raise ModelError(
                    f"{name} sums over the values of discrete sites, and the visible site "
                    f"'{site.name}' is continuous. Use ScoreMatching, DenoisingScoreMatching or "
                    "NCE; EnergyDiscrepancy for sites of both kinds."
                )
            if not (self.adjacent and lowest_count(site) is not None):
                self.check_num_values(site, len(check_values(site, name)))

    def check_num_values(self, site: RowSite, num_values: int) -> None:
        """Raise unless a coordinate may have this many values."""

    @abstractmethod
    def coordinate_loss(self, log_ratios: jax.Array) -> jax.Array:
        """Loss of one coordinate, of shape (rows,), or of several, (rows, coordinates).

        :param log_ratios: log p̃ at the other values minus log p̃ at the value of the row; other
            values lead. A value that is none of them has -inf. Where only ``adjacent`` ones count,
            the next one comes first and the previous one last, cyclically; the next may be both.
        """

    def energy_loss(self, rng_key: jax.Array, params: Params, problem: Problem) -> jax.Array:
        row_model = problem.row_model
        log_ratios = self._by_indicators(params, problem)
        if log_ratios is not None:
            return row_model.mean(jnp.sum(self.coordinate_loss(log_ratios), -1))
        estimate = self.estimate(rng_key, params, problem)
        here = estimate.log_density(params, problem.unconstrained)

        def log_ratio(changed):
            point = {**problem.unconstrained, **changed}
            return estimate.log_density(params, point) - here

        sites = row_model.visible.values()
        total: Any = sum(self._site_loss(site, problem, log_ratio) for site in sites)
        return row_model.mean(total)

    def _by_indicators(self, params, problem):
        """Log-ratios of all coordinates from one gradient in the indicators; or ``None``.

        Of shape (states, rows, coordinates), -inf at the state of the row itself.
        """
        form = self._form(params, problem)
        if form is None:
            return None
        args = {name: params[name] for name in problem.row_model.parameters}
        indicators = form.indicators(problem.row_model.flatten(problem.unconstrained))
        slopes = form.secants(args, indicators)
        if slopes is None:
            tell_general(form.names, form.why_not_affine, form.program)
            return None
        if form.is_binary:
            return ((1.0 - 2.0 * indicators) * slopes)[None]
        here = jnp.sum(indicators * slopes, -1, keepdims=True)
        if self.adjacent:
            number, own = jnp.sum(form.is_state, -1), jnp.argmax(indicators, -1)
            beside = jnp.stack([(own + 1) % number, (own - 1) % number], -1)
            return jnp.moveaxis(jnp.take_along_axis(slopes - here, beside, -1), -1, 0)
        is_other = form.is_state & (indicators == 0)
        return jnp.moveaxis(jnp.where(is_other, slopes - here, -jnp.inf), -1, 0)

    def _form(self, params, problem):
        """log p̃ in the indicators of the visible sites, of one row where all are alike."""
        row_model = with_rows(problem.row_model, 1) or problem.row_model
        sites = row_model.visible
        if row_model.latent:
            tell_general(sites, f"{sorted(row_model.latent)} are latent, and summed out of it")
            return None
        if counts := [name for name, site in sites.items() if lowest_count(site) is not None]:
            tell_general(counts, "they have no largest value")
            return None
        own = problem._replace(row_model=row_model, unconstrained=row_model.unconstrain_visible())
        estimate, name = self.estimate(default_key(), params, own), type(self).__name__
        rows = row_model.to_rows(own.unconstrained)

        def log_density(args, rows):
            return estimate.log_density({**params, **args}, row_model.from_rows(rows))

        return multi_affine(
            log_density,
            {name: params[name] for name in row_model.parameters},
            {name: jnp.asarray(rows[name]) for name in sorted(rows)},
            {k: support_values(site, name) for k, site in sites.items()},
            in_pairs=True,
        )

    def _site_loss(self, site, problem, log_ratio):
        """Sum over the coordinates of one site, of shape (rows,)."""
        row_model, name = problem.row_model, site.name
        rows = row_model.to_rows({name: jnp.asarray(problem.unconstrained[name])})[name]
        shifts, move = self._neighbours(site)
        if not len(shifts):
            return jnp.zeros(row_model.num_rows)  # no neighbours, and nothing to learn
        flat = jnp.reshape(rows, (len(rows), -1))
        coordinates = jnp.arange(flat.shape[1])

        def of_coordinate(d):
            def at(shift):
                moved, is_value = move(flat, shift)
                moved = jnp.reshape(jnp.where(coordinates == d, moved, flat), rows.shape)
                found = log_ratio(row_model.from_rows({name: moved}))
                return found if is_value is None else jnp.where(is_value[:, d], found, -jnp.inf)

            return self.coordinate_loss(jax.vmap(at)(shifts))

        batch_size = max(1, NEIGHBOURS_AT_ONCE // len(shifts))
        if len(coordinates) <= batch_size:
            return jnp.sum(jax.vmap(of_coordinate)(coordinates), 0)
        # Too many to be kept for the backward pass, which evaluates them again.
        of_coordinate = jax.checkpoint(of_coordinate)
        return jnp.sum(jax.lax.map(of_coordinate, coordinates, batch_size=batch_size), 0)

    def _neighbours(self, site):
        """Places to the neighbours of a coordinate, and what moves all coordinates there.

        ``(flat, shift) -> (moved, is_value)``; ``is_value`` is ``None`` if all moves are possible.
        """
        lowest = lowest_count(site)
        if lowest is not None:

            def count(flat, shift):
                moved = flat + shift
                return jnp.maximum(moved, lowest), moved >= lowest

            return jnp.array([1, -1]), count
        values = support_values(site, type(self).__name__)
        K = len(values)
        shifts = sorted({1 % K, K - 1}) if self.adjacent else range(1, K)
        return jnp.array(shifts, int), lambda flat, shift: (shifted(flat, shift, values), None)
