# SPDX-License-Identifier: Apache-2.0
"""Sites with finitely many values: which they are, and all joint states of a row."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from numpyro_ebm._compat import not_jax_tracer
from numpyro_ebm.errors import ModelError
from numpyro_ebm.language.distributions import Counting, scalar_support
from numpyro_ebm.language.sites import unwrap
from numpyro_ebm.model.row_model import RowModel
from numpyro_ebm.model.row_site import RowSite
from numpyro_ebm.types import SiteValues

__all__ = [
    "check_values",
    "grid",
    "in_all_rows",
    "is_binary",
    "joint_states",
    "lowest_count",
    "num_joint_states",
    "shifted",
    "support_values",
]


def support_values(site: RowSite, who: str) -> np.ndarray:
    """The values of one coordinate of a discrete site, rising, as a NumPy array of shape (K,).

    They are those of ``enumerate_support``, and may have gaps: spins of -1 and 1 have two values.

    :param RowSite site: the site.
    :param str who: who asks, for the error.
    :raises ModelError: if there are infinitely many, if they are arrays, if they are not the same
        for all elements of the site, or if one is there twice.
    """
    fn = unwrap(site.fn)
    if isinstance(fn, Counting) and fn.has_enumerate_support:
        return np.arange(fn.num_values, dtype=jnp.result_type(int))
    what = f"{who}: the values of the site '{site.name}' ({type(fn).__name__})"
    if not fn.has_enumerate_support:
        raise ModelError(
            f"{who}: the site '{site.name}' ({type(fn).__name__}) has infinitely many values, or "
            "none that NumPyro can enumerate. Use a finite base measure, such as "
            "`Counting(num_values)`, or a method that does not sum over values, such as NCE or "
            "DiscreteFisher."
        )
    try:
        with jax.ensure_compile_time_eval():  # concrete inside of `jit` too
            values = np.asarray(fn.enumerate_support(expand=False))
    except (NotImplementedError, TypeError):
        raise ModelError(
            f"{what} must be the same for all its elements, and known before the model runs."
        ) from None
    if values.size != len(values):
        raise ModelError(f"{what} are arrays, not numbers; write it with `Counting(num_values)`.")
    values = np.sort(values.ravel())
    if np.any(values[1:] == values[:-1]):
        raise ModelError(f"{what} are {values.tolist()}: one of them is there twice.")
    return values


def check_values(site: RowSite, who: str) -> np.ndarray:
    """The :func:`support_values` of a visible site; raises if its data have others.

    A support such as ``integer_interval(-1, 1)`` holds numbers that are not among the values.
    """
    values = support_values(site, who)
    if not_jax_tracer(site.value) and not np.all(is_there := np.isin(site.value, values)):
        raise ModelError(
            f"{who}: the data of the visible site '{site.name}' are not among its values, "
            f"{values.tolist()}, in {np.sum(~is_there)} of {np.size(is_there)} places."
        )
    return values


def lowest_count(site: RowSite) -> Any:
    """The smallest value of a site that takes all integers from there on; ``None`` of others."""
    support = scalar_support(site.fn.support)
    lowest: Any = getattr(support, "lower_bound", None)
    if not site.is_discrete or np.ndim(lowest) or hasattr(support, "upper_bound"):
        return None
    return lowest


def is_binary(site: RowSite) -> bool:
    """Whether every coordinate of a discrete site is 0 or 1."""
    try:
        return np.array_equal(support_values(site, ""), [0, 1])
    except ModelError:
        return False


def num_joint_states(row_model: RowModel, names: Iterable[str], who: str) -> float:
    """Number of joint states of some discrete sites of a row, a float: it may be infinite."""
    columns = _coordinates(row_model, names, who)
    return math.prod(float(len(x)) for site in columns.values() for x in site)


def joint_states(row_model: RowModel, names: Iterable[str], who: str) -> SiteValues:
    """All joint states of some discrete sites of a row.

    :param RowModel row_model: the model.
    :param names: names of its sites.
    :param str who: who asks, for the error.
    :return: dict of arrays of shape (states, ...), with the shape of the site in one row.
    :raises ModelError: as in :func:`support_values`.
    """
    columns = _coordinates(row_model, names, who)
    if not columns:
        return {}
    states = grid([x for site in columns.values() for x in site])
    ends = np.cumsum([len(site) for site in columns.values()])
    parts = np.split(states, ends[:-1], axis=1)
    return {
        name: jnp.asarray(part.reshape(-1, *_row_shape(row_model, name)))
        for name, part in zip(columns, parts, strict=True)
    }


def in_all_rows(row_model: RowModel, state: SiteValues) -> SiteValues:
    """One of the :func:`joint_states` as values of its sites, the same in all rows."""
    rows = row_model.num_rows
    return row_model.from_rows({k: jnp.broadcast_to(x, (rows, *x.shape)) for k, x in state.items()})


def grid(columns: Sequence[Any], xp: Any = np) -> Any:
    """All combinations of the values of several coordinates, of shape (combinations, coordinates).

    :param list columns: the values of each coordinate; the last one changes fastest.
    :param xp: ``numpy``, or ``jax.numpy`` for arrays that may be traced.

    **Example**

    >>> from numpyro_ebm.model.finite_supports import grid
    >>> grid([[0, 1], [5, 6]]).tolist()
    [[0, 5], [0, 6], [1, 5], [1, 6]]
    """
    if not len(columns):
        return xp.zeros((1, 0), int)
    return xp.stack([x.ravel() for x in xp.meshgrid(*columns, indexing="ij")], -1)


def _coordinates(row_model, names, who):
    """The values of every coordinate of a row, by site."""
    values = {name: support_values(row_model.sites[name], who) for name in names}
    return {name: [x] * math.prod(_row_shape(row_model, name)) for name, x in values.items()}


def _row_shape(row_model, name):
    """Shape of a site in one row."""
    value = row_model.sites[name].value
    shape = list(jnp.shape(value))
    del shape[row_model.row_axis(name, value)]
    return tuple(shape)


def shifted(values: jax.Array, shift: ArrayLike, support: np.ndarray) -> jax.Array:
    """Move values on by ``shift`` < K places among those of their support, cyclically.

    :param values: array of values, all in the support.
    :param shift: places, an array of integers that broadcasts against it.
    :param support: the K values of :func:`support_values`.

    **Example**

    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> from numpyro_ebm.model.finite_supports import shifted
    >>> shifted(jnp.array([-1, 0, 5]), 1, np.array([-1, 0, 5])).tolist()
    [0, 5, -1]
    """
    dtype, lowest, num_values = jnp.result_type(values), support[0], len(support)
    if not np.array_equal(support, lowest + np.arange(num_values)):  # it has gaps
        index = jnp.searchsorted(jnp.asarray(support, dtype), values)
        return jnp.asarray(support, dtype)[(index + shift) % num_values]
    wide = dtype if jnp.issubdtype(dtype, jnp.floating) else jnp.result_type(int)  # no overflow
    moved = jnp.asarray(values, wide) + jnp.asarray(shift, wide)
    return jnp.where(moved >= lowest + num_values, moved - num_values, moved).astype(dtype)
