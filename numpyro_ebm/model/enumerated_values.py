# SPDX-License-Identifier: Apache-2.0
"""Values that NumPyro enumerates: a function of parameters, evaluated at each of them.

Under `NUTS`, `TraceEnum_ELBO` and ``Predictive(infer_discrete=True)`` a discrete site holds all its
values at once, along an axis left of every plate. To a row model such an axis would be one more
plate, over which it sums; here the function is mapped over it, and the axis put back in its place.
"""

from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp

from numpyro_ebm.errors import ModelError
from numpyro_ebm.model.row_model import RowModel
from numpyro_ebm.program.compilation import run_compiled
from numpyro_ebm.types import SiteValues

__all__ = ["EnumeratedValues"]


class EnumeratedValues:
    """Site values of a running model, some of them perhaps enumerated. Made by :meth:`find`.

    - **one** - the first of the values of every site, by name.
    - **lead** - sizes of the axes left of the plates, ``()`` if nothing is enumerated.

    :param dict values: values by name; those that are enumerated lead by one axis of all.
    :param names: which are.
    :param tuple lead: as above.
    :param int depth: axes of the plates, counted from the right.
    """

    def __init__(self, values: SiteValues, names: set[str], lead: tuple[int, ...], depth: int):
        self._values, self._names, self._depth = values, names, depth
        self.lead = lead
        self.one = {k: x[0] if k in names else x for k, x in values.items()}

    @classmethod
    def find(cls, values: SiteValues, row_model: RowModel, who: str) -> Self:
        """Compare the shapes of values with those that the sites of a model have.

        :param dict values: values of parameters and latent sites, by name.
        :param RowModel row_model: the model, read where nothing is enumerated.
        :param str who: the caller, for messages.
        :raises ModelError: if a site in a plate is enumerated, or too few axes are left to plates.
        """
        sites = {name: (row_model.parameters[name], fn) for name, fn in row_model.priors.items()}
        sites |= {name: (site.value, site.fn) for name, site in row_model.latent.items()}
        axes, depth = {}, -row_model.dim
        for name in values.keys() & sites.keys():
            own, num_plates = jnp.shape(sites[name][0]), len(sites[name][1].batch_shape)
            shape, depth = jnp.shape(values[name]), max(depth, num_plates)
            extra = len(shape) - len(own)
            if extra > 0 and shape[extra:] != own:
                raise ModelError(_of_plates(who, name))
            if extra > 0:
                axes[name] = shape[:extra] + (1,) * num_plates
        if not axes:
            return cls(values, set(), (), depth)
        found: Any = jnp.broadcast_shapes(*axes.values())
        if any(size > 1 for size in found[-depth:]):
            raise ModelError(
                f"{who}: the values of {sorted(axes)} are enumerated along an axis of a plate. Say "
                f"`max_plate_nesting={depth}` where NumPyro enumerates, or more."
            )
        lead, flat = found[:-depth], dict(values)
        for name, shape in axes.items():
            own = jnp.shape(sites[name][0])
            x = jnp.reshape(values[name], (*shape[:-depth], *own))
            flat[name] = jnp.reshape(jnp.broadcast_to(x, (*lead, *own)), (-1, *own))
        return cls(flat, set(axes), lead, depth)

    def map(self, fn: Callable[[SiteValues], Any]) -> Any:
        """``fn`` of the values by name, compiled; at all enumerated ones, along a leading axis."""
        if self._names:
            axes = {name: 0 if name in self._names else None for name in self._values}
            fn = jax.vmap(fn, in_axes=(axes,))
        return run_compiled(fn, self._values)

    def place(self, x: jax.Array, dim: int | None = None) -> jax.Array:
        """What :meth:`map` returned, as the log-density of a site.

        :param x: one value, or one for each row.
        :param int dim: dimension of the plate of the rows, counted from the right, if it has them.
        """
        if dim is None:
            return jnp.reshape(x, self.lead + (1,) * self._depth) if self._names else x
        shape = (x.shape[-1],) + (1,) * (-1 - dim)
        if self._names:
            shape = self.lead + (1,) * (self._depth + dim) + shape
        return jnp.reshape(x, shape)


def _of_plates(who, name):
    return (
        f"{who}: NumPyro enumerates the discrete parameter '{name}', which is in a plate. All rows "
        "read all of its elements, so that their values would have to be summed jointly. Write the "
        f'elements as sites of their own outside of plates (`numpyro.sample(f"{name}_{{i}}", ...)` '
        "and `jnp.stack`), or sample them: `MixedHMC` or `DiscreteHMCGibbs`."
    )
