# SPDX-License-Identifier: Apache-2.0
"""A sample site of a row: its base measure, its value, and what data may be its value."""

from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.distributions import Delta, ImproperUniform, biject_to, constraints

from numpyro_ebm._compat import not_jax_tracer
from numpyro_ebm.errors import ModelError
from numpyro_ebm.keys import default_key
from numpyro_ebm.language.distributions import Counting, is_real, scalar_support
from numpyro_ebm.language.explained import wrong_shape
from numpyro_ebm.language.sites import unwrap

__all__ = ["RowSite", "check_data", "check_shape", "coordinates", "placeholder"]


class RowSite(NamedTuple):
    """A sample site inside the data plate.

    - **name** - name of the site.
    - **fn** - its distribution, the base measure, as traced.
    - **value** - the observed value; a placeholder of the right shape for a latent site.
    - **dims** - names of the dimensions of ``value``: plates, then ``<name>_dim_<i>``.
    """

    name: str
    fn: Any
    value: Any
    dims: tuple[str, ...]

    @classmethod
    def of(cls, site: dict[str, Any]) -> Self:
        """Make one of a site of a trace."""
        num_batch, num_dims = len(site["fn"].batch_shape), len(site["fn"].shape())
        plates = {num_batch + frame.dim: frame.name for frame in site["cond_indep_stack"]}
        free = iter(range(num_dims))
        dims = tuple(
            plates[i] if i in plates else f"{site['name']}_dim_{next(free)}"
            for i in range(num_dims)
        )
        return cls(site["name"], site["fn"], site["value"], dims)

    @property
    def event_dim(self) -> int:
        return self.fn.event_dim

    @property
    def is_discrete(self) -> bool:
        return bool(self.fn.support.is_discrete)

    @property
    def is_real(self) -> bool:
        return is_real(self.fn.support)

    @property
    def is_flat(self) -> bool:
        """Whether the base measure is constant, so that only energies can shape the site."""
        return isinstance(unwrap(self.fn), ImproperUniform | Counting)

    @property
    def is_unconstrained(self) -> bool:
        """Whether the site's own coordinates are used: it is discrete, or real already."""
        return self.is_discrete or self.is_real

    @property
    def transform(self) -> Any:
        """T in v = T(u); the identity for a discrete site, which has no other coordinates."""
        return biject_to(constraints.real if self.is_discrete else self.fn.support)

    def unconstrain_draw(self, value: jax.Array) -> jax.Array:
        """Coordinates T⁻¹(x) of values drawn here, of any leading axes.

        A uniform draw is exactly the end of its interval, which has no coordinates, once in
        some millions. The draw stands for all those that are rounded to it, and is taken between
        the end and the next: eps of the way to T(0). Data are left as they are, see
        :func:`coordinates`.
        """
        if self.is_unconstrained:
            return value
        transform, coordinates = self.transform, self.transform.inv(value)
        if biject_to(scalar_support(self.fn.support)).domain.event_dim:  # as ordered or a simplex
            return coordinates
        within = transform(jnp.zeros_like(coordinates))
        nearby = value + jnp.finfo(value.dtype).eps * (within - value)
        nearby = jnp.where(nearby == value, jnp.nextafter(value, within), nearby)
        return jnp.where(jnp.isfinite(coordinates), coordinates, transform.inv(nearby))


def placeholder(site: dict[str, Any]) -> jax.Array | None:
    """A value on the support for a site that has none, so that a model can be traced."""
    if site["type"] != "sample" or site["value"] is not None or isinstance(site["fn"], Delta):
        return None
    fn = site["fn"]
    if fn.support.is_discrete:
        lowest = getattr(scalar_support(fn.support), "lower_bound", 0)
        return jnp.full(fn.shape(), lowest, dtype=jnp.result_type(int))
    try:
        transform = biject_to(fn.support)
    except NotImplementedError:  # a sphere, until it is reparameterised
        return fn.sample(default_key())
    return transform(jnp.zeros(transform.inverse_shape(fn.shape())))


def check_shape(site: RowSite) -> None:
    """Raise if the value of a site has not its shape.

    :param RowSite site: the site.
    """
    if jnp.shape(site.value) != site.fn.shape():
        raise ModelError(wrong_shape(site.name, jnp.shape(site.value), site.fn.shape()))


def check_data(site: RowSite) -> None:
    """Raise if data cannot be the value of a visible site; traced data are not looked at.

    :param RowSite site: the site.
    :raises ModelError: if they contain NaN or leave the support.
    """
    name, value, support = site.name, site.value, site.fn.support
    if not_jax_tracer(value) and _number_where("isfinite", value) < jnp.size(value):
        what = "NaN" if _number_where("isnan", value) else "infinite values"
        raise ModelError(
            f"The data of the visible site '{name}' contain {what}, and nothing is masked in "
            "silence. Leave those rows out, `numpyro.handlers.mask(mask="
            "jnp.isfinite(data).all(-1))` around all of the data plate; or say which elements are "
            "missing, in a plate of them, "
            "`numpyro.sample(..., obs=data, obs_mask=jnp.isfinite(data))`."
        )
    if not not_jax_tracer(value) or is_real(support):
        return
    # Spins of -1 and 1 on `Counting(2)`, or a zero under a logarithm, would mislead silently.
    with jax.ensure_compile_time_eval():
        inside = support(value)
    if not not_jax_tracer(inside):  # its bounds depend on parameters
        return
    num_outside = _number_where("logical_not", inside)
    if num_outside:
        raise ModelError(
            f"The data of the visible site '{name}' leave its support, {support}, in "
            f"{num_outside} of {jnp.size(inside)} places. Recode them (spins "
            "of -1 and 1 as 0 and 1, for instance), declare another base measure, or say which are "
            "missing, `numpyro.sample(..., obs=data, obs_mask=known)`."
        )


def coordinates(site: RowSite) -> Any:
    """The value of a visible site in unconstrained coordinates, T⁻¹(v).

    :param RowSite site: the site.
    :raises ModelError: if values lie on the boundary of their support, where coordinates are
        infinite; traced values are not looked at.
    """
    value, support = site.value, site.fn.support
    if site.is_unconstrained:
        return value
    if not_jax_tracer(value):
        with jax.ensure_compile_time_eval():
            found = site.transform.inv(value)
            if isinstance(scalar_support(support), type(constraints.simplex)):
                bad = jnp.asarray(value) <= 0  # in the last place its coordinates are cut off
            else:
                bad = ~jnp.isfinite(found)
        num_bad = _number_where("asarray", bad) if not_jax_tracer(bad) else 0
        if num_bad:
            raise ModelError(
                f"The data of the visible site '{site.name}' lie on the boundary of its support, "
                f"{support}, in {num_bad} of {jnp.size(bad)} places, where their unconstrained "
                "coordinates are infinite. Declare a wider support (for numbers from 0 to 1 "
                "`constraints.interval(-0.05, 1.05)`, say), or move them inside: whole numbers, "
                "such as grey values, by `numpyro_ebm.datasets.dequantize`; or leave those rows "
                "out."
            )
    return site.transform.inv(value)


def _number_where(is_so, x):
    """How many elements are so: also on the devices of other processes, where some are there."""
    if getattr(x, "is_fully_addressable", True):
        return int(np.sum(getattr(np, is_so)(np.asarray(x))))
    with jax.ensure_compile_time_eval():
        return int(jnp.sum(getattr(jnp, is_so)(x)))
