# SPDX-License-Identifier: Apache-2.0
r"""A model as a function of arrays: rows, sites, supports and the row log-joint.

.. math:: \log \tilde p(v, h; θ) = \sum_{\text{sites of the row}} \log b - \sum_{\text{energies}} E,

one value per row, free of the scale that a subsampled data plate puts on every site. Latent and
visible sites may be several and of any event shape, and may sit in further plates.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from numpyro.handlers import substitute, trace

from numpyro_ebm._compat import ClosedJaxpr
from numpyro_ebm.language.handlers import resolve_normalizer
from numpyro_ebm.model.data_plate import DataPlate
from numpyro_ebm.model.reference import reference_log_prob
from numpyro_ebm.model.row_site import RowSite, coordinates
from numpyro_ebm.program.marks import Operand
from numpyro_ebm.samplers.positions import flatten_sites, unflatten_sites
from numpyro_ebm.types import Model, Params, SiteValues, Trace

if TYPE_CHECKING:
    from numpyro_ebm.model.traced_model import TracedModel

__all__ = ["RowModel"]


class RowModel(DataPlate):
    """A NumPyro model read as arrays. Made by :func:`~numpyro_ebm.model.reading.read_model`.

    - **traced** - its operations, a :class:`~numpyro_ebm.model.traced_model.TracedModel`.
    - **model, args, kwargs** - the model and its arguments.
    - **plate, dim, num_rows, total_rows** - the data plate.
    - **plates** - indices of all plates, and states of networks, by name.
    - **visible, latent** - dicts of :class:`~numpyro_ebm.model.row_site.RowSite`.
    - **observed** - sites that are held at their values: those that ``read_fixed_model`` set aside,
      and those that an objective is conditional on.
    - **parameters** - values of the `param` sites, and of latent sites outside the data plate, by
      name (their values in this trace).
    - **constraints** - constraints of the `param` sites by name.
    - **priors** - distributions of the parameters that are sample sites, by name.
    - **energies** - names of the energy sites.
    - **is_fixed** - whether the model itself answers for its normalizer.
    - **unconditioned** - names of the sites whose observation was taken away.
    - **integrated** - names of the real sites that kernels integrate out; see the handler.
    - **row_weights** - how often the rows count, of shape (rows,), or ``None`` for once; see
      :mod:`~numpyro_ebm.model.row_weights`.
    - **covariates** - arguments other than the visible values, and parameters, that give every row
      an energy (and so a normalizer) of its own.
    - **arguments** - which argument is the value of which visible site.

    :param dict sites: all sites of the data plate but for its energies.
    """

    def __init__(
        self,
        traced: TracedModel,
        sites: dict[str, RowSite],
        plates: dict[str, Any],
        parameters: Params,
        constraints: dict[str, Any],
        priors: dict[str, Any],
    ):
        self.traced = traced
        self.model = traced.model
        self.args, self.kwargs = traced.arguments.args, traced.arguments.kwargs
        at = traced.data_plate
        super().__init__(at.plate, at.dim, at.num_rows, at.total_rows, at.subsampled, at.obs_masked)
        self.energies, self.is_fixed = traced.energies, traced.is_fixed
        self.unconditioned, self.integrated = traced.unconditioned, traced.integrated
        seen = {k: x for k, x in sites.items() if k in traced.observed}
        self.visible = {k: x for k, x in seen.items() if k not in traced.given}
        self.latent = {k: x for k, x in sites.items() if k not in seen}
        self.observed = {k: x for k, x in seen.items() if k in traced.given}
        self.plates, self.parameters = plates, parameters
        self.constraints, self.priors = constraints, priors
        self.row_weights: jax.Array | None = None
        self.covariates: list[str] = []  # found by `row_analysis.check_rows`
        self.arguments: dict[str, str] = {}
        self._remembered: dict[Any, Any] = {}  # see `remember`

    def log_density(self, params: Params, values: Params) -> jax.Array:
        """Row log-joint log p̃ at given parameters and site values.

        :param dict params: parameter values by name.
        :param dict values: values of visible and latent sites by name; observed sites that are not
            named keep their observed value.
        :return: array of shape (rows,).
        """
        total: Any = sum(self.terms({**params, **values}).values())
        return total

    def terms(self, data: Params) -> dict[str, jax.Array]:
        """The terms of :meth:`log_density` by site, each of shape (rows,)."""
        return self.traced.evaluate("terms", {**self._own_values(), **data})

    def terms_program(self) -> tuple[ClosedJaxpr, list[Operand], list[str]]:
        """The operations of :meth:`terms`, without running them.

        :return: a jaxpr, what its arguments are, and the names of its results.
        """
        sites = {**self.observed, **self.sites}
        values = {name: site.value for name, site in sites.items()}
        return self.traced.operations("terms", {**self.plates, **self.parameters, **values})

    def weigh(self, rows: jax.Array) -> jax.Array:
        """What rows count: an array of shape (..., rows) times their weights, if they have any.

        Rows of weight 0 count exactly 0.
        """
        weights = self.row_weights
        return rows if weights is None else jnp.where(weights > 0, weights * rows, 0.0)

    def mean(self, rows: jax.Array) -> jax.Array:
        r"""The mean over rows that a loss is, :math:`\frac1N \sum_n w_n x_n`.

        :param rows: array of shape (..., rows); the axes in front are averaged over as well.
        """
        return jnp.mean(self.weigh(rows))

    def log_reference(self, values: SiteValues) -> jax.Array | float:
        """What elements that nothing reads add to the terms of sites, (rows,), or 0.

        :param dict values: values of visible or latent sites, by name.
        """
        found = [
            self.sum_to_rows(reference_log_prob(self.sites[name].fn, x))
            for name, x in values.items()
            if name in self.obs_masked
        ]
        total: Any = sum(found) if found else 0.0
        return total

    def log_prior(self, params: Params) -> jax.Array:
        """log π(θ), a scalar: the log-density of all that the model states outside its plate."""
        sites = {name: site.value for name, site in self.sites.items()}
        data = {**sites, **self._own_values(), **params}
        total: Any = sum(self.traced.evaluate("prior", data).values(), start=0.0)
        return total

    def deterministic(self, params: Params, values: Params) -> dict[str, jax.Array]:
        """Values of the model's `deterministic` sites at given parameters and site values."""
        return self.traced.evaluate("deterministic", {**self._own_values(), **params, **values})

    def _own_values(self):
        """Values of the sites that need not be given."""
        sites = {**self.observed, **self.sites}
        params = {name: self.parameters[name] for name in self.constraints}
        return {**self.plates, **params, **{k: sites[k].value for k in self.traced.observed}}

    def trace_at(self, data: Params) -> Trace:
        """The model's trace at given parameters and site values."""
        held = {name: site.value for name, site in self.observed.items()}
        return trace(self.substituted({**held, **data})).get_trace(*self.args, **self.kwargs)

    def substituted(self, data: Params) -> Model:
        """The model at given parameters and site values, its energies allowed to evaluate."""
        return resolve_normalizer(substitute(self.model, data={**self.plates, **data}))

    unit = "rows"

    @property
    def rows_shape(self) -> tuple[int, ...]:
        """The shape of what has one value a row."""
        return (self.num_rows,)

    @property
    def sites(self) -> dict[str, RowSite]:
        """All visible and latent sites."""
        return {**self.visible, **self.latent}

    def with_latent(self, names: Iterable[str]) -> RowModel:
        """The same model with these sites as latent ones, and all others as visible ones."""
        row_model = copy.copy(self)
        row_model.latent = {k: site for k, site in self.sites.items() if k in names}
        row_model.visible = {k: site for k, site in self.sites.items() if k not in names}
        return row_model

    def remember(self, question: Any, find: Callable[[], Any]) -> Any:
        """What ``find()`` returns, found once for a question about these latent sites."""
        key = repr(question), tuple(self.latent)
        if key not in self._remembered:
            self._remembered[key] = find()
        return self._remembered[key]

    def row_axis(self, name: str, unconstrained: ArrayLike) -> int:
        """Axis of the rows in an unconstrained value of a visible or latent site."""
        site = self.sites[name]
        event_dim = site.transform.domain.event_dim
        extra = site.event_dim - site.transform.codomain.event_dim
        return jnp.ndim(unconstrained) + self.dim - event_dim - extra

    def to_rows(self, unconstrained: SiteValues) -> SiteValues:
        """Move the rows of unconstrained values to the leading axis."""
        return {k: jnp.moveaxis(x, self.row_axis(k, x), 0) for k, x in unconstrained.items()}

    def from_rows(self, rows: SiteValues) -> SiteValues:
        """Undo :meth:`to_rows`."""
        return {k: jnp.moveaxis(x, 0, self.row_axis(k, x)) for k, x in rows.items()}

    def flatten(self, unconstrained: SiteValues) -> jax.Array:
        """All coordinates of a row in one vector, (rows, dimension), sites sorted by name."""
        rows = self.to_rows(unconstrained)  # gradients and compiled functions sort dicts as well
        return flatten_sites(rows, sorted(rows))[0]

    def unflatten(self, flat: jax.Array, like: Any = None) -> SiteValues:
        """Undo :meth:`flatten` for the visible sites.

        :param dict like: what has the shapes and types of the result, if not the observed values.
        """
        like = self.unconstrain_visible if like is None else lambda like=like: like
        like = jax.eval_shape(lambda: self.to_rows(like()))
        rows = unflatten_sites(flat, like, sorted(like))
        return self.from_rows({name: x.astype(like[name].dtype) for name, x in rows.items()})

    @property
    def sizes(self) -> dict[str, int]:
        """Coordinates of every visible site in a row, in the order of :meth:`flatten`."""
        shapes = jax.eval_shape(self.unconstrain_visible)
        return {name: math.prod(shapes[name].shape) // self.num_rows for name in sorted(shapes)}

    def rows_like(self, per_row: jax.Array, name: str, unconstrained: ArrayLike) -> jax.Array:
        """Reshape an array of shape (rows,) to broadcast against an unconstrained visible value."""
        axis = self.row_axis(name, unconstrained)
        return jnp.reshape(per_row, (-1,) + (1,) * (jnp.ndim(unconstrained) - axis - 1))

    def row_dot(self, x: SiteValues, y: SiteValues) -> jax.Array:
        """Inner products per row of two dicts of unconstrained visible values, of shape (rows,)."""
        total = jnp.zeros(self.num_rows)
        for name in x:
            product = jnp.broadcast_to(x[name] * y[name], jnp.shape(x[name]))
            axis = self.row_axis(name, product)
            others = [a for a in range(jnp.ndim(product)) if a != axis]
            total = total + jnp.sum(product, others)
        return total

    # Unconstrained coordinates of the visible sites: v = T(u).

    @property
    def visible_values(self) -> SiteValues:
        """Observed values of the visible sites."""
        return {name: site.value for name, site in self.visible.items()}

    def unconstrain_visible(self) -> SiteValues:
        """Observed visible values in unconstrained coordinates, u = T⁻¹(v).

        :raises ModelError: if values lie on the boundary of their support, as far as is known.
        """
        return {name: coordinates(site) for name, site in self.visible.items()}

    def constrain(self, unconstrained: SiteValues) -> tuple[SiteValues, jax.Array | float]:
        """Map unconstrained coordinates to site values.

        :param dict unconstrained: unconstrained values by site name.
        :return: dict of values on the sites' supports, and log |dT/du| of shape (rows,).
        """
        values, log_det = {}, 0.0
        for name, u in unconstrained.items():
            site = self.sites[name]
            if site.is_unconstrained:
                values[name] = u
                continue
            transform = site.transform
            values[name] = transform(u)
            jacobian = transform.log_abs_det_jacobian(u, values[name])
            extra = jnp.ndim(jacobian) - (jnp.ndim(values[name]) - site.event_dim)
            jacobian = jnp.sum(jacobian, tuple(range(-extra, 0))) if extra else jacobian
            log_det = log_det + self.sum_to_rows(jacobian)
        return values, log_det

    def unconstrained_log_density(
        self, params: Params, unconstrained: SiteValues, values: SiteValues
    ) -> jax.Array:
        """Row log-density of ``unconstrained`` sites, log-Jacobian included, given ``values``."""
        constrained, log_det = self.constrain(unconstrained)
        return self.log_density(params, {**constrained, **values}) + log_det
