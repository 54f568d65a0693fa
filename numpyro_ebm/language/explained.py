# SPDX-License-Identifier: Apache-2.0
"""A user's model that fails: which of its arguments, values or statements it failed on.

A model runs before anyone knows what its sites are. Data of a wrong shape then fail in the
middle of its energy, in the words of a matrix product. Nothing is refused here that a model can
work with: only where it has failed is it asked what was wrong with what it was given.
"""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
from numpyro.distributions import MaskedDistribution
from numpyro.primitives import Messenger

from numpyro_ebm._compat import (
    failed_statement,
    not_jax_tracer,
    trace_state,
    undrawable_statement,
)
from numpyro_ebm.error_pages import note
from numpyro_ebm.errors import ImproperSamplingError, ModelError, UnknownArgumentError, shown
from numpyro_ebm.inputs import argument_name, as_arrays, list_of_numbers
from numpyro_ebm.language.distributions import Unnormalized

__all__ = ["WHAT_A_ROW_NEEDS", "explained", "wrong_shape", "wrong_value"]

WHAT_A_ROW_NEEDS = (
    'Write `with numpyro.plate("data", len(data)):` around the visible sites, the latent sites '
    "and the energy, with everything that is not a row in event dimensions or in further plates."
)
EXPLAINED = TypeError, ValueError, IndexError, KeyError, AttributeError, AssertionError
OF_TRACED = jax.errors.JAXTypeError, jax.errors.JAXIndexError
NOT_EXPLAINED = (ImproperSamplingError, *OF_TRACED)
NOTE_OF_TRACED = (
    "A model is a program of JAX, where sites have no values yet: `jnp` in the place of `np`, "
    "`jnp.where` in the place of `if`."
)


class explained(Messenger):
    """Take arguments of any library, and say of a model that fails what was wrong with them.

    :param fn: a model or a guide.
    """

    _arguments: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = self._arguments = as_arrays(args, kwargs)
        return super().__call__(*args, **kwargs)

    def __enter__(self) -> Any:
        self._observed, self._changed, self._names, self._twice = {}, {}, set(), []
        self._starts = []
        self._trace_state = trace_state()
        return super().__enter__()

    def __exit__(self, exc_type: Any, exc_value: Any, traceback: Any) -> None:
        super().__exit__(exc_type, exc_value, traceback)
        self._trace_state = None  # which cannot be pickled
        if isinstance(exc_value, OF_TRACED) and NOTE_OF_TRACED not in _notes(exc_value):
            exc_value.add_note(NOTE_OF_TRACED)
            exc_value.add_note(note("models"))
        if isinstance(exc_value, EXPLAINED) and not isinstance(exc_value, NOT_EXPLAINED):
            why = self._wrong_data() or next(iter(self._starts), None)
            if why is None and not isinstance(exc_value, ModelError):  # which says more
                _check_call(self.fn, *self._arguments)
                why = self._wrong_shapes() or self._wrong_statement(exc_value)
            if why is not None:
                raise ModelError(why) from exc_value

    def process_message(self, msg: dict[str, Any]) -> None:
        name = msg.get("name")
        if msg["type"] in ("sample", "param", "deterministic") and not isinstance(name, str):
            raise ModelError(
                f"A statement `numpyro.{msg['type']}` has a `{type(name).__name__}` for a name. "
                f'Names come first, and are strings: `numpyro.{msg["type"]}("name", ...)`.'
            )
        asks = msg["type"] == "param" and msg["args"] and msg["args"][0] is None  # of a module
        if msg["type"] in ("sample", "param", "deterministic", "visible") and not asks:
            self._twice += [name] if name in self._names else []
            self._names.add(name)
        is_energy = isinstance(msg.get("fn"), Unnormalized)
        if is_energy and trace_state() != self._trace_state:
            raise ModelError(
                f"The energy '{name}' is stated in the body of a loop or of another transformation "
                "of JAX (`lax.scan`, `jit`, `vmap`), which repeats operations and no statements. "
                "Compute its value there, and state it outside: `numpyro_ebm.energy(name, value)`."
            )
        is_value = msg["type"] == "sample" and not is_energy
        if is_value and msg["is_observed"] and msg["fn"].event_shape != (0,):
            if msg["cond_indep_stack"]:
                self._observed[name] = msg["value"], msg["fn"].shape()
            msg["value"] = _of_a_wide_type(msg["value"], msg["fn"])

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "param":
            own = msg["args"][0] if msg["args"] else None
            self.compare(msg["name"], own, msg["value"])
        is_value = msg["type"] == "sample" and not isinstance(msg["fn"], Unnormalized)
        is_enumerated = msg["type"] == "sample" and msg["infer"].get("enumerate") == "parallel"
        if is_value and not (msg["is_observed"] or is_enumerated):
            why = wrong_value(msg["name"], msg["value"], msg["fn"].shape())
            self._starts += [] if why is None else [why]  # words, which can be pickled

    def compare(self, name: str, own: Any, value: Any) -> None:
        """Remember the value of a parameter if it has another shape than the model gives it."""
        if (hasattr(own, "shape") or _is_number(own)) and _shape_or_type(own) != (
            given := _shape_or_type(value)
        ):
            self._changed[name] = given, jnp.shape(own)

    def _wrong_data(self):
        """What is wrong with the data of a site whatever the model makes of them, or ``None``."""
        for name, (value, shape) in self._observed.items():
            if not hasattr(value, "shape") and not _is_number(value):
                return (
                    f"The data of the visible site '{name}' are a `{type(value).__name__}`, and "
                    f"an array of shape {shape} is needed. {_instead_of(value)}"
                )
            if jnp.iscomplexobj(value):
                return (
                    f"The data of the visible site '{name}' are complex, and an energy has real "
                    "sites. Give real and imaginary parts as two elements of its event shape."
                )
            if not _broadcasts(jnp.shape(value), shape):
                return wrong_shape(name, jnp.shape(value), shape)
        return None

    def _wrong_shapes(self):
        """What may have made a model fail: arguments, data or parameters of another shape."""
        for path, x in jax.tree_util.tree_leaves_with_path(self._arguments):
            if hasattr(x, "shape") and 0 in x.shape:
                return f"The {argument_name(path)} of the model is empty, of shape {x.shape}."
        for name, (value, shape) in self._observed.items():
            if jnp.shape(value) != shape:
                return wrong_shape(name, jnp.shape(value), shape)
        for name, (given, shape) in self._changed.items():
            return (
                f"The parameter '{name}' was given a value of {given}, and the model "
                f"declares it with the shape {shape}. Give it that shape, or call the model with "
                "the arguments from which it takes its sizes: after a fit, "
                "`fixed(model, fit.params, **svi.static_kwargs)`."
            )
        return None

    def _wrong_statement(self, error):
        """Which statement or argument a model failed on, or ``None``."""
        if self._twice:
            return (
                f"Two statements of the model are named '{self._twice[0]}'. Sites, parameters and "
                "energies need names of their own; rename one of them."
            )
        undrawable = undrawable_statement(error)
        if undrawable is not None:
            return _no_distribution(*undrawable)
        site = failed_statement(error)
        if site is not None:
            return _outside_of_plates(*site)
        for i, x in enumerate(self._arguments[0]):
            if list_of_numbers(x):
                return (
                    f"The argument number {i + 1} of the model is a list, and the model failed on "
                    f"it ({type(error).__name__}: {error}). Pass an array, `jnp.asarray(data)`."
                )
        for path, x in jax.tree_util.tree_leaves_with_path(self._arguments):
            if not hasattr(x, "shape") and type(x).__name__ in str(error):
                return (
                    f"The {argument_name(path)} of the model is a `{type(x).__name__}`, and the "
                    f"model failed on it ({type(error).__name__}: {error}). {_instead_of(x)}"
                )
        return None


def _is_number(x):
    return isinstance(x, bool | int | float | complex)


def _shape_or_type(x):
    """What a value has instead of the shape that was meant, in words."""
    if not hasattr(x, "shape") and not _is_number(x):
        return f"type `{type(x).__name__}`"
    return f"shape {jnp.shape(x)}"


def _notes(error):
    return getattr(error, "__notes__", ())


def _instead_of(x):
    """What to pass in the place of something that is no array."""
    if isinstance(x, list | tuple):
        return "Pass `jnp.asarray(data)`."
    return (
        "Pass an array; `EnergySVI.run` takes in the place of its first argument batches too: an "
        "iterator, a data loader, or a function without parameters that makes one."
    )


def _broadcasts(found, shape):
    """Whether one shape can stand for the other."""
    try:
        return jnp.broadcast_shapes(found, shape) == shape
    except ValueError:
        return False


def wrong_shape(name: str, found: tuple[int, ...], shape: tuple[int, ...]) -> str:
    """The message about data that have not the shape of their site."""
    return (
        f"The data of the visible site '{name}' have shape {found}, but its plates and event "
        f"shape ask for {shape}. Rows lead, and what follows them is the event shape: transpose "
        f"the data, reshape them, or declare their site with `event_shape={found[1:]}`."
    )


def wrong_value(name: str, value: Any, shape: tuple[int, ...]) -> str | None:
    """The message about a site that is not observed and has a value of another shape, if it is so.

    :param str name: the site.
    :param value: its value, of which nobody knows who gave it.
    :param tuple shape: the shape of the site.
    """
    given = _shape_or_type(value)
    if given == f"shape {shape}":
        return None
    return (
        f"The site '{name}' was given a value of {given}, and its plates and event shape ask for "
        f"{shape}. That is the shape of a start, by `init_to_value` or `init_params`, and of what "
        "`substitute` or `condition` sets."
    )


def _outside_of_plates(name, fn, frames):
    plates = ", ".join(f"'{f.name}' (dim {f.dim}, size {f.size})" for f in frames)
    shape = tuple(fn.batch_shape)
    if isinstance(fn, Unnormalized):
        return (
            f"The energy '{name}' has shape {shape}, which does not go into its plates ({plates}): "
            "one energy for each element. Sum over event dimensions, as in `jnp.sum(..., -1)`, and "
            "compute it from sites of the same plates."
        )
    if name.endswith("observed") and isinstance(fn, MaskedDistribution):  # what `obs_mask` makes
        name = name.removesuffix("_observed").removesuffix("_unobserved")
        return (
            f"The `obs_mask` of the site '{name}' has shape {shape}, which does not go into its "
            f"plates ({plates}). The event dimensions of a site are known together: declare what "
            "may be missing by itself in a plate of its own, and not by `event_shape=`."
        )
    return (
        f"The site '{name}' is drawn from a {type(fn).__name__} of batch shape {shape}, which does "
        f"not go into its plates ({plates}). Dimensions that are no plate are event dimensions, "
        "`.to_event(1)`."
    )


def _no_distribution(name, fn):
    made = getattr(fn, "__name__", None) if callable(fn) else None
    given = f"`{made}` itself" if made else shown(fn)
    remedy = f"Call it, `{made}(...)`." if made else "Values of a site are given by `obs=`."
    return f"The site '{name}' is drawn from a distribution, and was given {given}. {remedy}"


def _check_call(fn, args, kwargs):
    """Raise if a model does not take as many arguments, or none of such a name."""
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):  # of a builtin
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        names = tuple(k for k in kwargs if k not in signature.parameters)
        name = getattr(fn, "__name__", type(fn).__name__)
        raise UnknownArgumentError(
            f"The model `{name}{signature}` cannot be called with {len(args)} argument(s) and the "
            f"keyword arguments {sorted(kwargs)}: {error}. Arguments that a call of the library "
            "does not know itself are passed on to the model.",
            names,
        ) from None


def _of_a_wide_type(value, fn):
    """Data as the numbers that arithmetic needs: the sum of two bits is no bit.

    Whole numbers of a real site are real, those of few bits have as many as integers have.
    """
    if not hasattr(value, "dtype"):
        return value
    is_whole = jnp.issubdtype(value.dtype, jnp.integer)
    is_narrow = value.dtype == bool or (is_whole and value.dtype.itemsize < 4)
    if not is_narrow and not (is_whole and not fn.support.is_discrete):
        return value
    dtype = jnp.result_type(int if fn.support.is_discrete else float)
    if not_jax_tracer(value):  # it stays known
        with jax.ensure_compile_time_eval():
            return jnp.asarray(value, dtype)
    return value.astype(dtype)
