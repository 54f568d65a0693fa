# SPDX-License-Identifier: Apache-2.0
"""The arguments of a model: their arrays, by labels, and what may decide which sites it has."""

import inspect
import operator
from typing import Any

import jax
import jax.numpy as jnp

from numpyro_ebm._compat import Tracer
from numpyro_ebm.errors import ModelError
from numpyro_ebm.inputs import argument_name, as_arrays
from numpyro_ebm.program.marks import signature

__all__ = ["Arguments", "check_own_argument"]


class Arguments:
    """Arguments and keyword arguments of a model.

    - **arrays** - their arrays of at least one dimension, by label: what a model may be traced in.
    - **names** - what to call them, by label.

    :param tuple args: arguments.
    :param dict kwargs: keyword arguments.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any] | None):
        self.args, self.kwargs = as_arrays(args, kwargs)
        self._leaves, self._structure = jax.tree.flatten((self.args, self.kwargs))
        self.arrays = {
            f"arg:{i}": _as_array(x)
            for i, x in enumerate(self._leaves)
            if hasattr(x, "shape") and hasattr(x, "dtype") and x.ndim > 0
        }

    @property
    def names(self) -> dict[str, str]:
        paths = jax.tree_util.tree_leaves_with_path((self.args, self.kwargs))
        return {f"arg:{i}": argument_name(path) for i, (path, _) in enumerate(paths)}

    def with_arrays(self, arrays: dict[str, Any]) -> "Arguments":
        """The same arguments with other arrays, by label; those that are not given stay."""
        leaves = [arrays.get(f"arg:{i}", x) for i, x in enumerate(self._leaves)]
        return Arguments(*jax.tree.unflatten(self._structure, leaves))

    def are(self, other: "Arguments") -> bool:
        """Whether they are the very same objects."""
        same = map(operator.is_, self._leaves, other._leaves)
        return self._structure == other._structure and all(same)

    def are_like(self, other: "Arguments") -> bool:
        """Whether they differ in the values of arrays only, not in their shapes or types."""
        return self.have_form_of(other) and signature(self.arrays) == signature(other.arrays)

    def have_form_of(self, other: "Arguments") -> bool:
        """Whether they differ in arrays only."""
        if self._structure != other._structure or self.arrays.keys() != other.arrays.keys():
            return False
        pairs = enumerate(zip(self._leaves, other._leaves, strict=True))
        return all(f"arg:{i}" in self.arrays or _are_equal(x, y) for i, (x, y) in pairs)


def check_own_argument(who: str, row_model: Any, name: str) -> None:
    """Raise unless a model has a keyword argument that the caller of ``who`` leaves to it.

    :param str who: of whom messages are.
    :param RowModel row_model: the model, read without that argument.
    :param str name: the argument, by which ``who`` gives the noise level.
    """
    if name in row_model.kwargs:
        raise ModelError(
            f"{who}: the model's argument '{name}' is the noise level of each row; leave it out "
            f"of the arguments, {who} gives it."
        )
    function = row_model.model
    while hasattr(function, "fn"):  # handlers around it
        function = function.fn
    try:
        inspect.signature(function).bind_partial(**{name: 0.0})
    except ValueError:  # a function that has none
        return
    except TypeError as error:
        raise ModelError(
            f"{who}: the model has no argument '{name}' for the noise level. Write "
            f"`def model(data=None, {name}=...)`, where it is a number or an array of shape "
            "(rows,), and let the energy depend on it."
        ) from error


def _are_equal(x, y):
    is_array = hasattr(x, "shape") or hasattr(y, "shape")
    return x is y or (not is_array and bool(x == y))


def _as_array(x):
    if isinstance(x, Tracer):
        return x
    with jax.ensure_compile_time_eval():  # data stay known, for who checks them
        return jnp.asarray(x)
