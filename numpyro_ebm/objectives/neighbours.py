# SPDX-License-Identifier: Apache-2.0
r"""Objectives that compare log p̃ at a row with log p̃ at its neighbours, so that log Z cancels.

The neighbours of a row are the states that differ from it in one coordinate; for a coordinate with
K values there are K - 1 of them. Where log p̃ is quadratic in the values, all log-ratios follow from
one gradient and the diagonal of a Hessian; otherwise every neighbour is an evaluation of log p̃.
"""

from abc import abstractmethod
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from numpyro_ebm.errors import ModelError
from numpyro_ebm.keys import default_key
from numpyro_ebm.model.finite_supports import check_values, shifted, support_values
from numpyro_ebm.model.resize import with_rows
from numpyro_ebm.model.row_model import RowModel
from numpyro_ebm.model.row_site import RowSite
from numpyro_ebm.objectives.base import Objective, Problem
from numpyro_ebm.program.polynomial import structure
from numpyro_ebm.program.quadratic import quadratic_form
from numpyro_ebm.types import Params

__all__ = ["NeighbourObjective"]

NEIGHBOURS_AT_ONCE = 64
"""About how many neighbours of every row are evaluated together, which bounds the memory."""

MOST_COORDINATES = 2_048
"""Of a row, for a Hessian of log p̃ to be written down."""


class NeighbourObjective(Objective):
    """A sum over coordinates of a function of log p̃ at the other values of that coordinate."""

    needs = "value"
    order = 1

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
            self.check_num_values(site, len(check_values(site, name)))

    def check_num_values(self, site: RowSite, num_values: int) -> None:
        """Raise unless a coordinate may have this many values."""

    @abstractmethod
    def coordinate_loss(self, log_ratios: jax.Array) -> jax.Array:
        """Loss of one coordinate, of shape (rows,), or of several, (rows, coordinates).

        :param log_ratios: log p̃ at the other values minus log p̃ at the value of the row; other
            values lead.
        """

    def energy_loss(self, rng_key: jax.Array, params: Params, problem: Problem) -> jax.Array:
        estimate = self.estimate(rng_key, params, problem)
        if _is_quadratic(estimate, problem):
            log_ratios = self._by_products(params, problem)
            if log_ratios is None and _has_a_row_for_each_axis(problem):
                log_ratios = self._by_gradient(params, estimate, problem)
            if log_ratios is not None:
                return problem.row_model.mean(self._quadratic_loss(log_ratios, problem))
        here = estimate.log_density(params, problem.unconstrained)

        def log_ratio(changed):
            point = {**problem.unconstrained, **changed}
            return estimate.log_density(params, point) - here

        sites = problem.row_model.visible.values()
        total: Any = sum(self._site_loss(site, problem, log_ratio) for site in sites)
        return problem.row_model.mean(total)

    def _by_products(self, params, problem):
        r"""log p̃ after a step δ along a coordinate minus before, where log p̃ is quadratic.

        .. math:: δ\, \big[ b + (x - m) (H - \operatorname{diag} H)
            + (x - m + \tfrac12 δ) \operatorname{diag} H \big]

        with b the gradient at the middle m of the values. For binary coordinates the last term is
        zero. ``None`` where H has no simple form.
        """
        sizes = problem.row_model.sizes
        total = sum(sizes.values())
        row_model = with_rows(problem.row_model, total) if total <= MOST_COORDINATES else None
        if row_model is None:
            return None
        own = problem._replace(row_model=row_model, unconstrained=row_model.unconstrain_visible())
        estimate, like = self.estimate(default_key(), params, own), _as_floats(own)

        def log_density(flat):
            return jnp.sum(estimate.log_density(params, row_model.unflatten(flat, like)))

        center, num_values = [], []
        for site, size in sizes.items():
            values = support_values(row_model.visible[site], type(self).__name__)
            center += [0.5 * (values[0] + values[-1])] * size
            num_values += [len(values)] * size
        center, num_values = np.array(center, jnp.result_type(float)), np.array(num_values)
        form = quadratic_form(jax.grad(log_density), center)
        if form is None:
            return None
        b, H = form
        away = problem.row_model.flatten(_as_floats(problem)) - center
        slope = away @ (H * (1 - np.eye(len(center), dtype=center.dtype)))
        slope = slope if b is None else b + slope

        def log_ratios(step, part):
            if np.all(num_values[part] == 2):
                return step * slope[:, part]
            own = (away[:, part] + 0.5 * step) * jnp.diagonal(H)[part]
            return step * (slope[:, part] + own)

        return log_ratios

    def _by_gradient(self, params, estimate, problem):
        r"""The same, by one gradient and the constant diagonal of one Hessian.

        .. math:: \log\tilde p(x + δ e_d) - \log\tilde p(x) = δ\, ∂_d \log\tilde p(x)
            + \tfrac12 δ^2\, ∂_d^2 \log\tilde p
        """
        row_model, point = problem.row_model, _as_floats(problem)
        total = sum(row_model.sizes.values())

        def log_density(u):
            return estimate.log_density(params, u)

        gradient = row_model.flatten(jax.grad(lambda u: jnp.sum(log_density(u)))(point))
        # Every row goes along an axis of its own: the curvature is the same in all of them.
        axes = jax.nn.one_hot(jnp.arange(row_model.num_rows) % total, total, dtype=gradient.dtype)
        axes = row_model.unflatten(axes, point)
        slope = lambda u: jax.jvp(log_density, (u,), (axes,))[1]  # noqa: E731
        curvature = jax.jvp(slope, (point,), (axes,))[1][:total]
        return lambda step, part: step * gradient[:, part] + 0.5 * step**2 * curvature[part]

    def _quadratic_loss(self, log_ratios, problem):
        """The loss from log-ratios as a function of steps and coordinates, of shape (rows,)."""
        row_model, name = problem.row_model, type(self).__name__
        point = _as_floats(problem)
        flat, losses, start = row_model.flatten(point), [], 0
        for site, size in row_model.sizes.items():
            part = slice(start, start + size)
            values = support_values(row_model.visible[site], name)
            here = flat[:, part]
            step = [shifted(here, k, values) - here for k in range(1, len(values))]
            if step:
                losses.append(jnp.sum(self.coordinate_loss(log_ratios(jnp.stack(step), part)), -1))
            start += size
        return sum(losses, jnp.zeros(row_model.num_rows))

    def _site_loss(self, site, problem, log_ratio):
        """Sum over the coordinates of one site, of shape (rows,)."""
        row_model, name = problem.row_model, site.name
        values = support_values(site, type(self).__name__)
        if len(values) == 1:
            return jnp.zeros(row_model.num_rows)  # no neighbours, and nothing to learn
        rows = row_model.to_rows({name: jnp.asarray(problem.unconstrained[name])})[name]
        flat = jnp.reshape(rows, (len(rows), -1))
        coordinates = jnp.arange(flat.shape[1])

        def of_coordinate(d):
            def at(shift):
                moved = shifted(flat, shift, values)
                moved = jnp.reshape(jnp.where(coordinates == d, moved, flat), rows.shape)
                return log_ratio(row_model.from_rows({name: moved}))

            return self.coordinate_loss(jax.vmap(at)(jnp.arange(1, len(values))))

        batch_size = max(1, NEIGHBOURS_AT_ONCE // (len(values) - 1))
        if len(coordinates) <= batch_size:
            return jnp.sum(jax.vmap(of_coordinate)(coordinates), 0)
        # Too many to be kept for the backward pass, which evaluates them again.
        of_coordinate = jax.checkpoint(of_coordinate)
        return jnp.sum(jax.lax.map(of_coordinate, coordinates, batch_size=batch_size), 0)


def _as_floats(problem):
    float_type = jnp.result_type(float)
    return {k: jnp.asarray(x, float_type) for k, x in problem.unconstrained.items()}


def _has_a_row_for_each_axis(problem):
    return sum(np.size(x) for x in problem.unconstrained.values()) <= problem.row_model.num_rows**2


def _is_quadratic(estimate, problem):
    """Whether log p̃ of a row is a polynomial of degree two in its values, the same for all rows."""
    row_model = problem.row_model
    if row_model.latent or row_model.covariates:
        return False
    point = _as_floats(problem)

    def log_density(u):
        return estimate.log_density(row_model.parameters, u)

    try:
        found = structure(log_density, point)
    except TypeError:  # values that serve as indices or flags, and not as numbers
        return False
    return found.degree <= 2 and found.true_gradient
