# SPDX-License-Identifier: Apache-2.0
"""A noise distribution over the visible sites, read as arrays: draws, and their density.

A noise may be written as a NumPyro distribution over the one visible site, a dict of distributions
by site name, a stack of transforms of a standard Normal, a flow of another library with ``sample``
and ``log_prob`` (flowjax), or a NumPyro function: one that returns a distribution (or a dict of
them), or one that samples the visible sites inside the data plate, as a guide does. A function is
called with the model's arguments, or without any if it takes none; covariates among them may give
every row a noise of its own, as a batch shape.
"""

import copy
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from numpyro.distributions.transforms import Transform
from numpyro.handlers import block, seed, substitute, trace

from numpyro_ebm.errors import ModelError
from numpyro_ebm.keys import default_key
from numpyro_ebm.language.sites import param_sites
from numpyro_ebm.model.noise_forms import (
    FORMS,
    is_float_array,
    is_flow,
    named_leaves,
    serves_support,
    transformed_normal,
    with_arguments,
)
from numpyro_ebm.model.row_model import RowModel
from numpyro_ebm.model.row_trials import row_axis_of
from numpyro_ebm.program.row_axes import row_axes
from numpyro_ebm.program.rows import MIXED
from numpyro_ebm.types import Params, SiteValues

__all__ = ["Noise"]


class Noise:
    """A distribution over the visible values of a model.

    :param noise: as the user wrote it.
    :param RowModel row_model: the model it stands beside.
    :param str name: prefix of the parameters of a noise that is not a NumPyro function.
    :param bool trainable: whether the arrays inside a distribution, a stack of transforms or a flow
        are parameters to train.
    :param bool covers: whether it has to have a density everywhere on the supports of the sites;
        values within them are enough where it says where something begins.
    :raises ModelError: if it is none of the forms above, or does not fit the visible sites.
    """

    def __init__(
        self,
        noise: Any,
        row_model: RowModel,
        name: str = "noise",
        *,
        trainable: bool = False,
        covers: bool = True,
    ):
        self.row_model, self.name, self._covers = row_model, name, covers
        self._function: Callable[..., Any] | None = None
        self._written = noise
        self._leaves, self._tree, self._trained = [], None, {}
        if isinstance(noise, Transform | list | tuple):
            noise = transformed_normal(noise, row_model)
        elif isinstance(noise, Callable) and not isinstance(noise, dist.Distribution):
            self._function = with_arguments(noise, row_model)
        elif not isinstance(noise, dict | dist.Distribution) and not is_flow(noise):
            raise ModelError(f"The noise must be {FORMS}; got {noise!r}.")
        if self._function is None:
            self._leaves, self._tree = jax.tree.flatten(noise)
            if trainable:
                # Copies, because one array may stand at two places with different constraints.
                self._leaves = [jnp.array(x) if is_float_array(x) else x for x in self._leaves]
                named = named_leaves(jax.tree.unflatten(self._tree, self._leaves), name)
                for i, x in enumerate(self._leaves):
                    if is_float_array(x):
                        path, constraint = named[id(x)]
                        self._trained[path] = i, constraint

    def parameters(self, rng_key: jax.Array) -> dict[str, tuple[Any, Any]]:
        """Initial values and constraints of the parameters by name."""
        if self._function is None:
            return {name: (self._leaves[i], c) for name, (i, c) in self._trained.items()}
        with block():
            return param_sites(trace(seed(self._function, rng_key)).get_trace())

    def _check_own_sites(self, params):
        """Refuse latent sites: they would have to be summed out of the density of the noise."""
        own = [
            name
            for name, site in self._trace(params).items()
            if site["type"] == "sample" and name not in self.row_model.visible
        ]
        if own:
            raise ModelError(
                f"The noise samples {own}, which are not visible sites, so that its density is an "
                "integral over them. Return a distribution with a density instead, for instance "
                "`dist.MixtureSameFamily`."
            )

    def refuse_own_rows(self) -> None:
        """Raise if the noise of a row is made of the values of that row.

        It may read covariates, and statistics of all rows. What is contrasted with a noise around
        itself is another likelihood; a symmetric one around the row is that of ConditionalNCE.
        """
        row_model, traced = self.row_model, self.row_model.traced
        if self._function is None or not row_model.arguments:
            return
        arrays = {label: traced.arguments.arrays[label] for label in row_model.arguments}
        sites = {label: row_model.visible[name] for label, name in row_model.arguments.items()}
        point = row_model.unconstrain_visible()

        def rows(arrays):
            here, other = traced.arguments.with_arrays(arrays), copy.copy(row_model)
            other.args, other.kwargs = here.args, here.kwargs
            return Noise(self._written, other, self.name).log_density({}, point)

        axes = [row_axis_of(sites[label], arrays[label], row_model) for label in sorted(arrays)]
        if row_axes(rows, arrays, axes)[0] not in (None, MIXED):
            names = ", ".join(repr(x) for x in sorted(set(row_model.arguments.values())))
            raise ModelError(
                f"The noise of a row reads the values of {names} in that very row, and is no "
                "noise then. Make it of covariates or of statistics of all rows; for noise around "
                "the row itself there is ConditionalNCE."
            )

    def distribution(self, params: Params) -> Any:
        """The noise itself at given parameters: a distribution, a dict of them, or a flow."""
        if self._function is None:
            leaves = list(self._leaves)
            for name, (i, _) in self._trained.items():
                leaves[i] = params.get(name, leaves[i])
            return jax.tree.unflatten(self._tree, leaves)
        with block():
            return seed(substitute(self._function, data=params), default_key())()

    def draw(self, rng_key: jax.Array, params: Params, num: int) -> SiteValues:
        """Unconstrained draws of the visible sites, ``num`` leading.

        A uniform draw is exactly the end of its interval, which has no coordinates, once in some
        millions: such a row is drawn anew. Only once, so that noise with a mass there stands out.
        """
        first = self._draw(rng_key, params, num)
        if all(site.is_unconstrained for site in self.row_model.visible.values()):
            return first
        again = self._draw(jax.random.fold_in(rng_key, 1), params, num)
        rows = {name: self.row_model.row_axis(name, x) for name, x in first.items()}
        inside = jnp.logical_and.reduce(
            jnp.stack(
                [
                    jnp.all(jnp.isfinite(x), [i for i in range(1, x.ndim) if i != rows[name]])
                    for name, x in first.items()
                ]
            )
        )

        def kept(name, x):
            shape = [n if i in (0, rows[name]) else 1 for i, n in enumerate(x.shape)]
            return jnp.where(inside.reshape(shape), x, again[name])

        return {name: kept(name, x) for name, x in first.items()}

    def _draw(self, rng_key, params, num):
        sites = self.row_model.visible
        found = self._checked(params)
        if found is None:  # the noise samples the sites itself

            def one(key):
                noise_trace = self._trace(params, key)
                return {name: noise_trace[name]["value"] for name in sites}

            values = jax.vmap(one)(jax.random.split(rng_key, num))
        else:
            keys = jax.random.split(rng_key, len(sites))
            values = {}
            for key, (name, site) in zip(keys, sites.items(), strict=True):
                fn, batch = found[name], site.fn.batch_shape
                if self._function is not None and isinstance(fn, dist.Distribution):  # by rows
                    values[name] = fn.expand(batch).sample(key, (num,))
                else:
                    values[name] = fn.sample(key, (num, *batch))
        for name, site in sites.items():
            expected = (num, *jnp.shape(site.value))
            if jnp.shape(values[name]) != expected:
                raise ModelError(
                    f"The noise draws '{name}' with shape {jnp.shape(values[name])[1:]}, and the "
                    f"visible site has shape {expected[1:]}."
                )
        return {
            name: x if sites[name].is_unconstrained else sites[name].transform.inv(x)
            for name, x in values.items()
        }

    def log_density(self, params: Params, unconstrained: SiteValues) -> jax.Array:
        """Log-density per row of unconstrained visible values, log-Jacobian included: (rows,)."""
        row_model = self.row_model
        values, log_det = row_model.constrain(unconstrained)
        found = self._checked(params)
        total = log_det + jnp.zeros(row_model.num_rows)
        if found is None:
            noise_trace = self._trace({**params, **values})
            for name in row_model.visible:
                total = total + row_model.sum_to_rows(row_model.site_log_prob(noise_trace[name]))
            return total
        for name, site in row_model.visible.items():
            log_prob = found[name].log_prob(values[name])
            log_prob = jnp.broadcast_to(log_prob, site.fn.batch_shape)
            total = total + row_model.sum_to_rows(log_prob)
        return total

    def site_distributions(self, params: Params) -> dict[str, Any]:
        """Distributions by site name at given parameters, for every form of noise."""
        found = self._checked(params)
        if found is None:
            noise_trace = self._trace(params)
            found = {name: noise_trace[name]["fn"] for name in self.row_model.visible}
        return found

    def _trace(self, data, rng_key=None):
        """Run a noise that is a NumPyro function, unseen by handlers around it."""
        rng_key = default_key() if rng_key is None else rng_key
        with block():
            run = substitute(self._function, data={**self.row_model.plates, **data})
            return trace(seed(run, rng_key)).get_trace()

    def _checked(self, params):
        """Distributions by site name; ``None`` where the noise samples the sites itself."""
        sites = self.row_model.visible
        if self._function is not None:
            self._check_own_sites(params)
        found = self.distribution(params)
        if found is None:
            noise_trace = self._trace(params)
            for name in sites:
                if name not in noise_trace or noise_trace[name]["type"] != "sample":
                    raise ModelError(
                        f"The noise neither returns a distribution nor samples the visible site "
                        f"'{name}'. It must be {FORMS}."
                    )
                if not self.row_model.owns(noise_trace[name]):
                    raise ModelError(
                        f"The noise samples '{name}' outside the data plate "
                        f"'{self.row_model.plate}'; put it inside a plate of that name."
                    )
                self._check_site(name, noise_trace[name]["fn"])
            return None
        if not isinstance(found, dict):
            if len(sites) > 1:
                raise ModelError(
                    f"The model has the visible sites {sorted(sites)}: give the noise as a dict of "
                    "distributions by site name."
                )
            found = {name: found for name in sites}
        for name in sites:
            if name not in found:
                raise ModelError(f"The noise has no distribution for the visible site '{name}'.")
            self._check_site(name, found[name])
        return found

    def _check_site(self, name, fn: Any):
        site = self.row_model.visible[name]
        if not isinstance(fn, dist.Distribution):
            if not is_flow(fn):
                raise ModelError(f"The noise of the visible site '{name}' must be {FORMS}.")
            if not site.is_real or tuple(fn.shape) != tuple(site.fn.event_shape):
                raise ModelError(
                    f"The flow has shape {tuple(fn.shape)} and lives on the reals; the visible "
                    f"site '{name}' has event shape {tuple(site.fn.event_shape)} and the support "
                    f"{site.fn.support}."
                )
            return
        if tuple(fn.event_shape) != tuple(site.fn.event_shape):
            raise ModelError(
                f"The noise of the visible site '{name}' has event shape {tuple(fn.event_shape)}, "
                f"and the site {tuple(site.fn.event_shape)}. Give one row of it, for instance "
                f"`dist.Normal(0, 1).expand({list(site.fn.event_shape)}).to_event("
                f"{len(site.fn.event_shape)})`."
            )
        batch = site.fn.batch_shape
        if self._function is not None and _broadcast(tuple(fn.batch_shape), batch) != batch:
            raise ModelError(
                f"The noise of the visible site '{name}' has batch shape {tuple(fn.batch_shape)}, "
                f"and the rows of the site {batch}. Give one distribution for all rows, or one "
                "for each, made of the covariates."
            )
        support: Any = fn.support
        if not serves_support(support, site.fn.support, self._covers):
            raise ModelError(
                f"The noise of the visible site '{name}' has the support {support}, and the "
                f"site {site.fn.support}: noise has to live where the data do"
                f"{', and everywhere' if self._covers else ''}."
            )


def _broadcast(shape, other):
    try:
        return np.broadcast_shapes(shape, other)
    except ValueError:
        return None
