# SPDX-License-Identifier: Apache-2.0
"""Where a source of batches is, as it says itself, in a form that a checkpoint can hold.

A source, or its iterator, says it by ``state_dict`` and is set there by ``load_state_dict``, as
PyTorch's stateful loaders, or by ``get_state`` and ``set_state``, as Grain's iterators. Reading a
place runs no code of its own.
"""

import base64
import importlib
from typing import Any

import numpy as np

from numpyro_ebm.errors import ModelError

__all__ = ["told_place", "set_place", "tells_place"]

METHODS = ("state_dict", "load_state_dict"), ("get_state", "set_state")


def tells_place(x: Any) -> bool:
    """Whether a source or an iterator can say where it is, and be set there.

    One with ``set_epoch`` (of Hugging Face) says where it is in an epoch, and begins every later
    one there as well: it is read from its beginning instead.
    """
    return not hasattr(x, "set_epoch") and any(_has(x, *methods) for methods in METHODS)


def told_place(*sources: Any) -> Any:
    """Where the first of several is that can tell; ``None`` if none can.

    :raises ModelError: if it says so by what is no JSON, bytes or array.
    """
    x = next(filter(tells_place, sources), None)
    if x is None:
        return None
    ask = next(ask for ask, tell in METHODS if _has(x, ask, tell))
    return _as_json(getattr(x, ask)(), type(x).__name__)


def set_place(x: Any, place: Any) -> bool:
    """Set a source to where :func:`told_place` found it; whether it can be."""
    for ask, tell in METHODS:
        if tells_place(x) and _has(x, ask, tell):
            getattr(x, tell)(_as_it_was(place))
            return True
    return False


def _has(x, *methods):
    return all(hasattr(x, name) for name in methods)


def _as_json(x, whose):
    """The place of a source, of dicts, lists, numbers, bytes and arrays, as JSON."""
    if x is None or isinstance(x, bool | int | float | str):
        return x
    if isinstance(x, dict) and all(isinstance(k, str) for k in x):
        return {"dict": {k: _as_json(v, whose) for k, v in x.items()}}
    if isinstance(x, list | tuple):
        return {"list" if isinstance(x, list) else "tuple": [_as_json(v, whose) for v in x]}
    if isinstance(x, bytes):
        return {"bytes": base64.b64encode(x).decode()}
    if not hasattr(x, "__array__") or np.asarray(x).dtype.kind not in "biufc":
        raise ModelError(
            "EnergySVI.run: where its batches are cannot be written into a checkpoint: "
            f"what {whose} says of it holds a {type(x).__name__}. Dicts, lists, numbers, bytes and "
            "arrays can be."
        )
    array, library = np.asarray(x), type(x).__module__.partition(".")[0]
    data = base64.b64encode(array.tobytes()).decode()
    return {"array": [data, array.dtype.str, list(array.shape), library]}


def _as_it_was(x):
    """What :func:`_as_json` was given; tensors of PyTorch are tensors again."""
    if not isinstance(x, dict):
        return x
    ((kind, found),) = x.items()
    if kind == "dict":
        return {k: _as_it_was(v) for k, v in found.items()}
    if kind == "bytes":
        return base64.b64decode(found)
    if kind != "array":
        return {"list": list, "tuple": tuple}[kind](map(_as_it_was, found))
    data, dtype, shape, library = found
    array = np.frombuffer(base64.b64decode(data), dtype).reshape(shape).copy()
    return importlib.import_module("torch").as_tensor(array) if library == "torch" else array[()]
