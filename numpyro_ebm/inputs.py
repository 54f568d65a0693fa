# SPDX-License-Identifier: Apache-2.0
"""Data frames, tensors and arrays of objects among the arguments of a model, as arrays of numbers.

All entries of the library pass their arguments through :func:`as_arrays`, so that what one of them
takes the others take as well, and what holds no numbers is refused by the name of the argument.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_ebm._compat import not_jax_tracer
from numpyro_ebm.errors import ModelError, shown

__all__ = ["argument_name", "as_arrays", "is_iterator", "list_of_numbers", "numbers_of"]


def as_arrays(
    args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a model with tables and tensors of other libraries as NumPy arrays.

    Those of JAX and NumPy, numbers, and whatever is no array stay the objects that they are, and so
    do arrays on disk.

    :param tuple args: arguments.
    :param dict kwargs: keyword arguments.
    :return: both.
    :raises ModelError: if an array holds text, dates or other objects that are no numbers, has
        masked elements or is sparse.
    """
    given = args, {} if kwargs is None else kwargs
    leaves, structure = jax.tree.flatten(given, is_leaf=is_iterator)
    foreign = [i for i, x in enumerate(leaves) if _is_foreign(x)]
    if not foreign:
        return given
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(given, is_iterator)]
    for i in foreign:
        leaves[i] = _numbers(leaves[i], argument_name(paths[i]))
    return jax.tree.unflatten(structure, leaves)


def numbers_of(owner: str, *, finite: bool = True, **named: Any) -> list[jax.Array]:
    """Arrays of numbers that a function without a model takes, such as draws.

    :param str owner: the function, for messages.
    :param bool finite: whether all have to be finite, where they are known.
    :param named: the arrays, of any library, or numbers and lists of them, by name.
    :return: the arrays, in their order.
    :raises ModelError: if one is anything else.
    """
    found, arrays = [], as_arrays((), named)[1]  # a dict that has been a pytree is sorted by name
    for name in named:
        x = arrays[name]
        try:
            x = jnp.asarray(x)
        except (TypeError, ValueError) as error:
            raise ModelError(
                f"{owner}: `{name}` must be an array of numbers, got {shown(x)}."
            ) from error
        if finite and not_jax_tracer(x) and not np.all(np.isfinite(x)):
            number = np.sum(~np.isfinite(x))
            raise ModelError(f"{owner}: `{name}` has {number} values that are NaN or infinite.")
        found.append(x)
    return found


def argument_name(path: tuple[Any, ...]) -> str:
    """What to call a leaf of ``(args, kwargs)``."""
    _, which, *inside = path
    name = f"'{which.key}'" if hasattr(which, "key") else f"number {which.idx + 1}"
    return f"argument {name}{jax.tree_util.keystr(tuple(inside))}"


def list_of_numbers(x: Any) -> bool:
    """Whether something is a list or a tuple of numbers, or of such lists."""
    while isinstance(x, list | tuple) and x:
        x = x[0]
        if isinstance(x, bool | int | float | str):
            return True
    return False


def is_iterator(x: Any) -> bool:
    """Whether something yields one thing after the other, once."""
    return hasattr(x, "__next__")


def _is_foreign(x):
    """Whether a leaf is an array, and none that JAX can take as it is."""
    if isinstance(x, jax.Array | np.number | np.bool_):
        return False
    if isinstance(x, np.ndarray):
        return isinstance(x, np.ma.MaskedArray) or not _is_numeric(x)
    if hasattr(x, "toarray") and hasattr(x, "nnz"):  # sparse
        return True
    own = not hasattr(x, "dtype") or any(hasattr(x, k) for k in ("to_numpy", "detach", "numpy"))
    return hasattr(x, "__array__") and own and not isinstance(x, type)


def _is_numeric(x):
    is_number = any(jnp.issubdtype(x.dtype, kind) for kind in (jnp.number, jnp.bool_))
    return is_number and x.dtype.kind != "m"  # a duration is a `signedinteger`


def _numbers(x, name):
    if hasattr(x, "toarray"):
        raise ModelError(
            f"The {name} is a sparse `{type(x).__name__}`. Pass its values, `.toarray()`."
        )
    if np.ma.is_masked(x):
        raise ModelError(
            f"The {name} is a masked array, and its mask would be forgotten. Pass `data.filled(0)` "
            "as the data and `~np.ma.getmaskarray(data)` as an argument of its own, for "
            "`numpyro.sample(..., obs=data, obs_mask=known)`."
        )
    if hasattr(x, "detach"):  # PyTorch: outside of its graph, and on the host
        x = x.detach().cpu()
        if str(x.dtype) == "torch.bfloat16":  # a type that NumPy has from JAX only
            return np.asarray(x.float()).astype(jnp.bfloat16)
    found = np.asarray(x)
    if found.dtype == object:
        found = _of_objects(found)
    if found is None or not _is_numeric(found):
        raise ModelError(
            f"The {name} holds {_what_it_holds(x)}, and an energy is a function of numbers. Leave "
            "it out, or encode it: categories as integers (`pandas.factorize`), dates as a number "
            "of days, missing entries by an `obs_mask`."
        )
    return found


def _of_objects(x):
    """An array of objects as one of numbers, or ``None``."""
    items = x.ravel().tolist()
    if any(item is None or isinstance(item, str | bytes) for item in items):
        return None
    try:
        found = np.asarray(x.tolist())
        return np.asarray(x, float) if found.dtype == object else found
    except (TypeError, ValueError):
        return None


def _what_it_holds(x):
    names = getattr(x, "column_names", getattr(x, "columns", ()))  # of Arrow, of pandas
    columns = [str(k) for k in names if not _is_column_of_numbers(x[k])]
    if columns:
        return f"no numbers in the column(s) {columns}"
    kinds = {"U": "text", "S": "text", "M": "dates", "m": "times", "V": "records"}
    array = np.asarray(x)
    if array.dtype.kind in kinds:
        return kinds[array.dtype.kind]
    found = sorted({type(item).__name__ for item in array.ravel().tolist()})
    return f"objects ({', '.join(found)})"


def _is_column_of_numbers(column):
    array = np.asarray(column)
    return _is_numeric(array) or (array.dtype == object and _of_objects(array) is not None)
