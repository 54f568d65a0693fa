# SPDX-License-Identifier: Apache-2.0
"""What can go wrong, by name: every error says which site it means and what to write instead.

The ``check_...`` functions hold options to their range, with one message for each kind.
"""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_ebm.error_pages import PointsToPage

__all__ = [
    "ConvergenceWarning",
    "FarNoiseWarning",
    "ImproperSamplingError",
    "InterruptedWarning",
    "ModelError",
    "NonFiniteLossWarning",
    "NormalizerDisagreementWarning",
    "QuadratureWarning",
    "ShortAuxiliaryWarning",
    "UnhandledEnergyError",
    "WidthWarning",
    "check_finite",
    "check_fraction",
    "check_integer",
    "check_not_negative",
    "check_positive",
    "check_takes",
    "field_or_item",
    "shown",
]


class ModelError(PointsToPage, ValueError):
    """A model, a guide or its arguments are not what an energy-based method needs."""


class UnknownArgumentError(ModelError):
    """A model was called with arguments that it does not take.

    :param str message: what happened.
    :param tuple names: keyword arguments that it does not know.
    :param bool is_complete: whether it is said already what they may have meant.
    """

    def __init__(self, message: str, names: tuple[str, ...] = (), *, is_complete: bool = False):
        super().__init__(message)
        self.names, self.is_complete = names, is_complete


class UnhandledEnergyError(PointsToPage, RuntimeError):
    """A density was asked of an energy whose normalizer log Z(θ) nobody has resolved."""


class ImproperSamplingError(PointsToPage, NotImplementedError):
    """A draw was asked of a base measure, which would ignore the energy (or has no draws at all).

    It is a :class:`NotImplementedError` because that is what NumPyro's initialisation strategies
    expect of a distribution that cannot be sampled.
    """


class NonFiniteLossWarning(RuntimeWarning):
    """Training met numbers that are not finite, and stopped, or undid the rounds they came from.

    :param message: what happened, with the step number.
    :param result: the :class:`~numpyro.infer.svi.SVIRunResult` up to the last finite state, so that
        nothing trained is lost where warnings are turned into errors.
    """

    def __init__(self, message: str, result: Any = None):
        super().__init__(message)
        self.result = result


class InterruptedWarning(RuntimeWarning):
    """Training was interrupted (Ctrl-C), and returned what it had.

    :param message: what happened, with the number of rounds.
    :param result: the :class:`~numpyro.infer.svi.SVIRunResult` so far.
    """

    def __init__(self, message: str, result: Any = None):
        super().__init__(message)
        self.result = result


class ConvergenceWarning(RuntimeWarning):
    """Markov chains did not do their work: rows that did not move, drift, or left the support."""


class FarNoiseWarning(RuntimeWarning):
    """Noise contrast ended where noise and data hardly overlap: its result is not to be trusted."""


class QuadratureWarning(RuntimeWarning):
    """A quadrature of exp(-E) is not accurate: too few nodes, or mass out of its reach."""


class NormalizerDisagreementWarning(RuntimeWarning):
    """Two ways to compute log Z differ by more than their errors: at least one of them is wrong."""


class EmulationWarning(RuntimeWarning):
    """A posterior lies where the emulated log Z in it is hardly known."""


class WidthWarning(RuntimeWarning):
    """Draws are far from the Gaussian that the adjustment of their width takes them for."""


class ShortAuxiliaryWarning(RuntimeWarning):
    """Auxiliary chains of the exchange algorithm end while they still drift: they are too short."""


def shown(value: Any) -> str:
    """What a message says of a value that is not what was asked for, in few words.

    :param value: anything; of an array its shape is said.
    """
    if hasattr(value, "dtype") and value.shape:
        return f"an array of shape {value.shape}"
    words = repr(value)
    return words if len(words) < 200 and "\n" not in words else f"a `{type(value).__name__}`"


def check_integer(owner: str, minimum: int = 1, **options: Any) -> None:
    """Raise :class:`ModelError` unless options are integers of at least ``minimum``.

    :param str owner: what the options belong to, for the message.
    :param options: values by name; booleans are no integers.
    """
    for name, value in options.items():
        integer = isinstance(value, int | np.integer) and not isinstance(value, bool)
        if not integer or value < minimum:
            what = "a positive integer" if minimum == 1 else f"an integer of at least {minimum}"
            raise ModelError(f"{owner}: `{name}` must be {what}, got {shown(value)}.")


def check_positive(owner: str, **options: Any) -> None:
    """Raise :class:`ModelError` unless options are positive, finite numbers, or traced."""
    _check_numbers(owner, options, lambda x: x > 0, "positive")


def check_not_negative(owner: str, **options: Any) -> None:
    """Raise :class:`ModelError` unless options are finite numbers of at least 0, or traced."""
    _check_numbers(owner, options, lambda x: x >= 0, "not negative")


def check_finite(owner: str, **options: Any) -> None:
    """Raise :class:`ModelError` unless options are finite numbers, or traced."""
    _check_numbers(owner, options, np.isfinite, "finite")


def check_fraction(owner: str, **options: Any) -> None:
    """Raise :class:`ModelError` unless options are numbers between 0 and 1, or traced.

    The ends are out of range.
    """
    _check_numbers(owner, options, lambda x: (0 < x) & (x < 1), "between 0 and 1")


def check_takes(
    owner: str, words: str, function: Any, args: tuple[Any, ...], kwargs: Any = None
) -> None:
    """Raise :class:`ModelError` unless a function can be called with arguments as it will be.

    :param str owner: what the function belongs to, for the message.
    :param str words: the function and its arguments.
    :param function: the function.
    :param tuple args: as many arguments.
    :param dict kwargs: arguments by name.
    """
    if not callable(function):  # which the annotation says
        return
    try:
        inspect.signature(function).bind(*args, **(kwargs or {}))
    except TypeError as error:
        raise ModelError(f"{owner}: {words}, and fails: {error}.") from None
    except ValueError:  # of a builtin
        pass


def field_or_item(state: Any, index: Any) -> Any:
    """What ``state[index]`` is; NumPyro asks so, by name, for ``extra_fields`` that are no fields.

    :param state: the state of a kernel, a ``NamedTuple``.
    :param index: a number, a slice, or a name.
    :raises ModelError: for a name, with those that there are.
    """
    if isinstance(index, str):
        raise ModelError(
            f"`extra_fields`: the kernel's {type(state).__name__} has no field '{index}'. It has "
            f"{', '.join(state._fields)}."
        )
    return tuple.__getitem__(state, index)


def _check_numbers(owner, options, is_right, what):
    for name, value in options.items():
        try:
            x = np.asarray(value)
        except jax.errors.TracerArrayConversionError:
            continue  # nothing is known of what is traced
        kinds = jnp.floating, jnp.integer
        if not x.size or not any(jnp.issubdtype(x.dtype, kind) for kind in kinds):
            raise ModelError(f"{owner}: `{name}` must be a number, {what}, got {shown(value)}.")
        if not np.all(np.isfinite(x) & is_right(x)):
            finite = "" if what == "finite" or np.all(np.isfinite(x)) else " and finite"
            raise ModelError(f"{owner}: `{name}` must be {what}{finite}, got {value}.")
