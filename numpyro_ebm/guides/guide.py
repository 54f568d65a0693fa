# SPDX-License-Identifier: Apache-2.0
"""A NumPyro guide q(h | v) read as arrays: particles, and their density for every row."""

from typing import Any

import jax
import jax.numpy as jnp
from numpyro.handlers import seed, substitute, trace

from numpyro_ebm.errors import ModelError
from numpyro_ebm.keys import default_key
from numpyro_ebm.language.explained import explained
from numpyro_ebm.language.handlers import set_visible
from numpyro_ebm.language.sites import param_sites
from numpyro_ebm.language.supports import check_drawn
from numpyro_ebm.model.row_model import RowModel
from numpyro_ebm.types import Model, Params, SiteValues, Trace

__all__ = ["Guide"]


class Guide:
    """A NumPyro guide q(h | v) of a row model, read as arrays.

    :param guide: the guide.
    :param RowModel row_model: the model.
    :param tuple args: arguments of the guide.
    :param dict kwargs: keyword arguments of the guide.
    """

    def __init__(
        self, guide: Model, row_model: RowModel, args: tuple[Any, ...], kwargs: dict[str, Any]
    ):
        self._guide, self._row_model, self._args, self._kwargs = guide, row_model, args, kwargs

    @property
    def function(self) -> Model:
        """The guide itself, a NumPyro function."""
        return self._guide

    def trace(
        self,
        rng_key: jax.Array,
        params: Params,
        visible: SiteValues,
        latent: SiteValues | None = None,
    ) -> Trace:
        """Run the guide at visible values; ``latent`` overrides its draws."""
        data = {**self._row_model.plates, **params, **({} if latent is None else latent)}
        guide = seed(set_visible(substitute(explained(self._guide), data=data), visible), rng_key)
        return trace(guide).get_trace(*self._args, **self._kwargs)

    def parameters(
        self, rng_key: jax.Array, params: Params | None = None
    ) -> dict[str, tuple[Any, Any]]:
        """Initial values and constraints of the guide's `param` sites by name."""
        guide_trace = self.trace(rng_key, {} if params is None else params, {})
        self.check(guide_trace)
        return param_sites(guide_trace)

    def check(self, guide_trace: Trace) -> None:
        """Every latent site of the model must be drawn by the guide, and nothing else.

        :raises ModelError: naming the site; also if it is drawn on another support.
        """
        observed = [*self._row_model.visible, *self._row_model.observed]
        for name, site in guide_trace.items():
            if site["type"] == "visible" and name not in observed:
                raise ModelError(
                    f"The guide reads `numpyro_ebm.visible('{name}', ...)`, and the visible sites "
                    f"of the model are {observed}. Name the site as the model does."
                )
        missing = [name for name in self._row_model.latent if name not in guide_trace]
        if missing:
            raise ModelError(
                f"The guide does not draw the latent site(s) {', '.join(map(repr, missing))} of "
                "the model. A guide is a NumPyro function q(h | v) that samples each of them "
                "under the same name and in the same plates."
            )
        row_model = self._row_model
        for name, site in row_model.latent.items():
            check_drawn(guide_trace[name], site.fn, site.value)
        known = {*row_model.sites, *row_model.parameters}
        for name, site in guide_trace.items():
            is_latent = site["type"] == "sample" and not site["is_observed"]
            if is_latent and name not in known and not site["infer"].get("is_auxiliary"):
                raise ModelError(
                    f"The guide draws '{name}', which is no site of the model (its latent sites "
                    f"are {sorted(row_model.latent)}). Rename it, or mark it by "
                    '`infer={"is_auxiliary": True}` if other draws of the guide are made of it.'
                )
            if site["type"] == "mutable":
                raise ModelError(f"The guide has the mutable site '{name}'; it must be stateless.")

    def draw(
        self, rng_key: jax.Array, params: Params, visible: SiteValues, num_particles: int
    ) -> SiteValues:
        """Draw particles h ~ q(h | v), held constant under differentiation.

        :return: dict of latent values, particles leading.
        """

        def one(rng_key):
            guide_trace = self.trace(rng_key, params, visible)
            self.check(guide_trace)
            return {name: guide_trace[name]["value"] for name in self._row_model.latent}

        return jax.lax.stop_gradient(jax.vmap(one)(jax.random.split(rng_key, num_particles)))

    def log_density(self, params: Params, visible: SiteValues, latent: SiteValues) -> jax.Array:
        """log q(h | v) per row, of shape (rows,), at given latent values.

        :raises ModelError: if a site of the guide lies outside the data plate, for then q has no
            density per row, or is none of the model's.
        """
        row_model, total = self._row_model, jnp.zeros(self._row_model.num_rows)
        for site in self.trace(default_key(), params, visible, latent).values():
            if site["type"] != "sample" or site["is_observed"]:
                continue
            if not row_model.owns(site):
                raise ModelError(
                    f"The guide draws '{site['name']}' outside the data plate '{row_model.plate}', "
                    "so that q(h | v) has no density per row, which is needed here. Draw it inside "
                    f'of `numpyro.plate("{row_model.plate}", ...)`.'
                )
            if site["name"] not in row_model.latent:
                raise ModelError(
                    f"The guide draws '{site['name']}' beside {sorted(row_model.latent)}, and the "
                    "density of these alone is needed here, to weigh particles. Make them of "
                    "a distribution with a density, such as a `TransformedDistribution`."
                )
            total = total + row_model.sum_to_rows(site["fn"].log_prob(site["value"]))
        return total
