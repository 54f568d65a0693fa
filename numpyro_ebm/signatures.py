# SPDX-License-Identifier: Apache-2.0
"""What a signature says of its arguments is made sure of where an object is made.

An option of the wrong type would else be met in the middle of a compiled program, or never: any
object serves as a flag. The annotations are there already, so that one function looks at all of
them, once the object has had its say; ranges are looked at by the ``check_...`` functions of
:mod:`numpyro_ebm.errors`.
"""

import builtins
import collections.abc
import difflib
import functools
import inspect
import types
import typing
from collections.abc import Callable
from typing import Any, Literal, TypeVar, Union

import jax
import numpy as np
from jax.typing import ArrayLike
from numpyro.distributions import Distribution

from numpyro_ebm._compat import is_prng_key, not_jax_tracer
from numpyro_ebm.error_pages import note
from numpyro_ebm.errors import ModelError, UnknownArgumentError, shown

__all__ = ["Checked", "checked", "explaining"]

VARIADIC = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD

Function = TypeVar("Function", bound=Callable[..., Any])


class Checked:
    """A class whose subclasses look at the arguments that they are made with."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in cls.__dict__:
            cls.__init__ = checked(cls.__init__)


def checked(function: Function) -> Function:
    """A function, or the ``__init__`` of a class, that looks at its arguments first.

    :param function: the function. Of its annotations, flags, whole and other numbers, strings,
        literals, functions, classes and unions of these are looked at.
    :return: the same, which raises :class:`ModelError` with the name of an argument that is none of
        what its annotation says.
    """
    explained = explaining(function)

    @functools.wraps(function)
    def looking(*args, **kwargs):
        try:
            result = explained(*args, **kwargs)
        except jax.errors.ConcretizationTypeError as error:
            raise ModelError(_which_is_traced(function, args, kwargs)) from error
        wrong = _find_wrong(function, args, kwargs)
        if wrong is not None:
            raise ModelError(wrong)
        return result

    return typing.cast(Function, looking)


def explaining(function: Function) -> Function:
    """A function that looks at its arguments where it fails: no call that works is refused.

    :param function: the function.
    :return: the same, which raises :class:`ModelError` in the place of an error in other words, if
        one of the arguments is none of what its annotation says. Of keyword arguments that a model
        does not take it says which of its own they may be.
    """

    @functools.wraps(function)
    def explained(*args, **kwargs):
        flags = {k: x for k, x in kwargs.items() if isinstance(x, str | list | tuple | dict)}
        if flags and (wrong := _flags(function) & flags.keys()):
            name = wrong.pop()
            owner = function.__name__
            raise ModelError(f"{owner}: `{name}` must be True or False, got {shown(flags[name])}.")
        try:
            return function(*args, **kwargs)
        except UnknownArgumentError as error:
            wrong = _find_wrong(function, args, kwargs)
            if wrong is not None:
                raise ModelError(wrong) from error
            meant = _meant(error.names, function, args)
            if not meant or error.is_complete:
                raise
            text = f"{error} Did you mean {meant}?"
            raise UnknownArgumentError(text, error.names, is_complete=True) from error.__cause__
        except ModelError:  # which says more
            raise
        except Exception as error:
            wrong = _find_wrong(function, args, kwargs)
            if wrong is not None:
                raise ModelError(wrong) from error
            unknown = kwargs.keys() - _options(function, args)
            meant = _meant(unknown, function, args)
            if isinstance(error, TypeError) and meant and f"'{next(iter(unknown))}'" in str(error):
                told = TypeError(f"{error}. Did you mean {meant}?")
                told.add_note(note("arguments-of-a-call"))
                raise told from None
            raise

    return typing.cast(Function, explained)


def _meant(names, function, args):
    """Which options are likely meant by names, in words; empty if none is."""
    own = _options(function, args)
    return " or ".join(f"`{m}`" for x in names for m in difflib.get_close_matches(x, own, 1))


def _options(function, args):
    """Names of the arguments of a function; with those that its object was made with."""
    own = list(inspect.signature(function).parameters)
    is_method = own[:1] == ["self"]
    return own + (list(inspect.signature(type(args[0])).parameters) if is_method else [])


def _find_wrong(function, args, kwargs):
    """What is wrong with an argument, in a sentence, or ``None``."""
    signature = inspect.signature(function)
    try:
        given = signature.bind(*args, **kwargs).arguments
    except TypeError:  # something is missing, or unknown
        return None
    hints = _hints(function)
    owner = type(args[0]).__name__ if function.__name__ == "__init__" else function.__name__
    for name, value in given.items():
        hint = hints.get(name, Any)
        if name in ("model", "guide") and value is not None:
            hint = Statements
        if name == "rng_key" and (value is not None or signature.parameters[name].default):
            hint = RandomKey
        if signature.parameters[name].kind not in VARIADIC and not _is_one(value, hint):
            order = [k for k in signature.parameters if k != "self"]
            order = f" Its arguments are {order[:4]}, in this order." if hint is RandomKey else ""
            return f"{owner}: `{name}` must be {_worded(hint)}, got {shown(value)}.{order}"
    return None


def _which_is_traced(function, args, kwargs):
    """Which arguments `jit`, `vmap` or `grad` made unknown, where a value has to be known."""
    given = inspect.signature(function).bind(*args, **kwargs).arguments.items()
    traced = [name for name, x in given if isinstance(x, jax.Array) and not not_jax_tracer(x)]
    return (
        f"{type(args[0]).__name__}: one of the arguments {traced} decides what is computed, so "
        "that its value has to be known; in `jit`, `vmap` or `grad` it is not. Pass a number."
    )


class RandomKey:
    """In the place of an annotation: a random key of JAX."""


class Statements:
    """In the place of an annotation: a function of NumPyro statements, a model or a guide."""


class KnownNames(dict):
    """Names that an annotation may use: those of types that only a type checker imports are any."""

    def __missing__(self, name):
        if hasattr(builtins, name):
            raise KeyError(name)
        return Any


@functools.cache
def _hints(function):
    names = KnownNames(getattr(inspect.unwrap(function), "__globals__", {}))
    return typing.get_type_hints(function, localns=names)


def _flags(function):
    """Arguments by keyword that are annotated as flags."""
    found = _hints(function).items()
    parameters = inspect.signature(function).parameters
    return {
        name
        for name, hint in found
        if hint is bool and name in parameters and parameters[name].kind not in VARIADIC
    }


def _is_one(value, hint):
    """Whether a value is what an annotation says, as far as that can be told."""
    if hint is Any or isinstance(hint, TypeVar):
        return True
    if hint is RandomKey:
        return is_prng_key(value)
    if hint is Statements:  # distributions are called as well, or made by calls
        made = "numpyro.distributions" in str(getattr(value, "__module__", ""))
        return callable(value) and not (isinstance(value, type | Distribution) or made)
    if hint == ArrayLike:
        numbers = isinstance(value, int | float | complex | list | tuple)
        return (numbers or hasattr(value, "dtype")) and not isinstance(value, bool)
    origin = typing.get_origin(hint)
    if origin in (Union, types.UnionType):
        if set(typing.get_args(ArrayLike)) < set(typing.get_args(hint)):
            return value is None or _is_one(value, ArrayLike)
        return any(_is_one(value, x) for x in typing.get_args(hint))
    if origin is Literal:
        return any(type(value) is type(x) and value == x for x in typing.get_args(hint))
    if hint is type(None):
        return value is None
    if hint is bool:
        return isinstance(value, bool | np.bool_)
    if hint is int:
        return isinstance(value, int | np.integer) and not isinstance(value, bool)
    if hint is float:
        numbers = int | float | np.number | np.ndarray | jax.Array
        is_number = isinstance(value, numbers) and not isinstance(value, bool)
        return is_number and np.ndim(value) == 0
    kind = hint if origin is None else origin
    if kind is tuple:
        return isinstance(value, tuple | list)
    if kind is collections.abc.Callable:
        return callable(value)
    if kind is collections.abc.Sequence:
        return hasattr(value, "__len__") and not isinstance(value, str | bytes | dict)
    if kind in (collections.abc.Iterable, collections.abc.Collection):  # of names, for the most
        return isinstance(value, kind) and not isinstance(value, str | bytes)
    return isinstance(value, kind) if isinstance(kind, type) else True


def _worded(hint):
    origin = typing.get_origin(hint)
    if origin in (Union, types.UnionType) and hint != ArrayLike:
        numbers = typing.get_args(ArrayLike)
        if set(numbers) < set(typing.get_args(hint)):
            return "a number, an array or `None`"
        return " or ".join(dict.fromkeys(map(_worded, typing.get_args(hint))))
    if origin is Literal:
        return " or ".join(map(repr, typing.get_args(hint)))
    kind = hint if origin is None else origin
    if hint == ArrayLike:
        return "a number or an array"
    words = {
        RandomKey: "a random key, such as `jax.random.key(0)`",
        Statements: "a function of NumPyro statements, and no class or distribution",
        type(None): "`None`",
        bool: "True or False",
        int: "an integer",
        float: "a number",
        str: "a string",
        tuple: "a tuple",
        collections.abc.Callable: "a function",
        collections.abc.Sequence: "a sequence",
        collections.abc.Iterable: "a sequence",
        collections.abc.Collection: "a sequence",
    }
    return words[kind] if kind in words else f"a `{getattr(kind, '__name__', kind)}`"
