# SPDX-License-Identifier: Apache-2.0
"""A fit in a file: parameters, losses, and all that a run needs to go on bit for bit.

The file is a zip of NumPy arrays under their names in the fit, and a table of contents in JSON.
Reading it runs no code. A state is put together again by the run that resumes from it, which knows
its optimisers and its objective.
"""

import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.infer.svi import SVIRunResult

from numpyro_ebm.errors import ModelError
from numpyro_ebm.svi.state import EnergySVIRunResult, EnergySVIState

__all__ = ["SavedState", "load", "save"]

FORMAT = 1
CONTENTS = "contents.json"


class SavedState(NamedTuple):
    """The state of a run as it was read from a file: arrays by their names in it.

    ``EnergySVI.run(..., init_state=fit.state)`` makes an :class:`EnergySVIState` of it.

    - **arrays** - by part and place, such as ``"optim_state[1]['mean']"``.
    - **objective** - the class of the objective it was trained by.
    """

    arrays: dict[str, Any]
    objective: str

    @property
    def rng_key(self) -> jax.Array:
        """The key of the run."""
        return self.arrays["rng_key"]

    def has(self, name: str) -> bool:
        """Whether it has a part."""
        return any(_is_of(name, key) for key in self.arrays)

    def part(self, name: str, like: Any) -> Any:
        """A part of the state with the structure of another one; what it has, if that fails."""
        mine = {key: x for key, x in self.arrays.items() if _is_of(name, key)}
        leaves, structure = jax.tree_util.tree_flatten_with_path(like)
        names = [name + jax.tree_util.keystr(path) for path, _ in leaves]
        if set(names) != mine.keys():
            return {key[len(name) :]: x for key, x in mine.items()}
        return jax.tree.unflatten(structure, [mine[key] for key in names])


def save(path: str | os.PathLike[str], fit: SVIRunResult) -> None:
    """Write a fit to a file; whoever stops it leaves the file as it was.

    :param path: where to.
    :param fit: what :meth:`EnergySVI.run` returned. Parameters may be nested; networks of other
        libraries are written as their arrays.
    :raises ModelError: if it is no fit, or some of it are no arrays.

    **Example**

    >>> import tempfile, pathlib, jax, jax.numpy as jnp, numpyro, optax
    >>> import numpyro_ebm as ebm
    >>> def gaussian(data):
    ...     mean = numpyro.param("mean", 0.0)
    ...     with numpyro.plate("data", len(data)):
    ...         v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
    ...         ebm.energy("E", 0.5 * (v - mean) ** 2)
    >>> svi = ebm.EnergySVI(gaussian, None, optax.adam(0.1), ebm.ScoreMatching())
    >>> fit = svi.run(jax.random.key(0), 20, jnp.arange(5.0), progress_bar=False)
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "gaussian.fit"
    >>> ebm.save(path, fit)
    >>> saved = ebm.load(path)
    >>> bool(saved.params["mean"] == fit.params["mean"])
    True
    >>> more = svi.run(
    ...     jax.random.key(0), 30, jnp.arange(5.0), init_state=saved.state, progress_bar=False
    ... )
    >>> int(more.state.step)
    50
    """
    if not isinstance(fit, SVIRunResult) or not isinstance(fit.state, EnergySVIState):
        raise ModelError(
            f"save: what `EnergySVI.run` returns is saved, got a {type(fit).__name__}."
        )
    parts = {"params": fit.params, "losses": fit.losses, **fit.state._asdict()}
    parts["ema_params"] = getattr(fit, "ema_params", None)
    arrays, kinds = {}, {}
    for name, tree in parts.items():
        for place, x in jax.tree.leaves_with_path(tree):
            key = name + jax.tree_util.keystr(place)
            arrays[key], kinds[key] = _written(key, x)
    contents = {
        "format": FORMAT,
        "objective": getattr(fit, "objective", ""),
        "kinds": kinds,
        "structures": {name: _outline(parts[name]) for name in ("params", "ema_params")},
    }
    partial = Path(f"{os.fspath(path)}.{os.getpid()}.partial")
    try:
        with zipfile.ZipFile(partial, "w") as file:
            file.writestr(CONTENTS, json.dumps(contents))
            for i, key in enumerate(kinds):
                with file.open(f"{i}.npy", "w", force_zip64=True) as entry:
                    np.lib.format.write_array(entry, arrays[key], allow_pickle=False)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load(path: str | os.PathLike[str], like: Mapping[str, Any] | None = None) -> EnergySVIRunResult:
    """Read a fit from a file that :func:`save` wrote.

    :param path: where from.
    :param like: parameters of the same structure, where networks of other libraries are among
        them: ``svi.get_params(svi.init(...))``.
    :return: the fit, with ``params``, ``losses``, ``ema_params``, and a ``state`` for the
        ``init_state`` of a run with the same model, guide, optimisers and objective.
    :raises ModelError: if it is not such a file, or ``like`` has other arrays.
    """
    try:
        with zipfile.ZipFile(path) as file:
            contents = json.loads(file.read(CONTENTS))
            arrays = {}
            for i, (key, kind) in enumerate(contents["kinds"].items()):
                with file.open(f"{i}.npy") as entry:
                    arrays[key] = _as_it_was(
                        np.lib.format.read_array(entry, allow_pickle=False), kind
                    )
    except (zipfile.BadZipFile, KeyError, ValueError) as error:
        raise ModelError(f"load: {os.fspath(path)} is not a fit that `save` wrote.") from error
    if contents["format"] != FORMAT:
        raise ModelError(
            f"load: {os.fspath(path)} has format {contents['format']}, and this version of "
            f"numpyro-ebm reads format {FORMAT}."
        )
    in_params = ("params", "ema_params", "losses")
    state = {k: x for k, x in arrays.items() if not any(_is_of(name, k) for name in in_params)}
    saved = SavedState(state, contents["objective"])
    params, ema_params = (
        _rebuilt(name, contents["structures"][name], arrays, like)
        for name in ("params", "ema_params")
    )
    fit = EnergySVIRunResult(params, saved, arrays["losses"])
    fit.ema_params, fit.objective = ema_params, contents["objective"]
    return fit


def _is_of(part, key):
    return key == part or key.startswith((part + "[", part + "."))


def _written(key, x):
    """An array that NumPy can write, and what it was."""
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return np.asarray(jax.random.key_data(x)), f"key {jax.random.key_impl(x)}"
    x = np.asarray(x)
    if x.dtype.hasobject:
        raise ModelError(f"save: {key} is no array of numbers.")
    if x.dtype.kind == "V":  # of an extension of NumPy, such as bfloat16
        return x.view(np.uint8 if x.dtype.itemsize == 1 else np.uint16), f"type {x.dtype.name}"
    return x, "array"


def _as_it_was(x, kind):
    what, _, name = kind.partition(" ")
    if what == "key":
        return jax.random.wrap_key_data(jnp.asarray(x), impl=name)
    return jnp.asarray(x.view(jnp.dtype(name)) if what == "type" else x)


def _outline(tree):
    """Dicts, lists and tuples as JSON; the type of anything else that holds arrays."""
    if isinstance(tree, dict):
        return {"dict": {key: _outline(x) for key, x in tree.items()}}
    if isinstance(tree, (list, tuple)) and not hasattr(tree, "_fields"):
        return {type(tree).__name__: [_outline(x) for x in tree]}
    if jax.tree.leaves(tree) and jax.tree.structure(tree).num_nodes == 1:
        return "array"
    return None if tree is None else {"other": type(tree).__name__}


def _rebuilt(name, structure, arrays, like) -> Any:
    """A tree of parameters from its structure and the arrays."""
    if structure == "array":
        return arrays[name]
    if structure is None:
        return None
    ((kind, inner),) = structure.items()
    if kind == "dict":
        children = {
            key: _rebuilt(f"{name}[{key!r}]", x, arrays, None if like is None else like.get(key))
            for key, x in inner.items()
        }
        return children
    if kind in ("list", "tuple"):
        parts = [None] * len(inner) if like is None else list(like)
        children = [
            _rebuilt(f"{name}[{i}]", x, arrays, part)
            for i, (x, part) in enumerate(zip(inner, parts, strict=True))
        ]
        return children if kind == "list" else tuple(children)
    built = SavedState({k: x for k, x in arrays.items() if _is_of(name, k)}, "").part(name, like)
    if like is None or jax.tree.structure(built) != jax.tree.structure(like):
        raise ModelError(
            f"load: {name} is a {inner} and not made of dicts, lists and arrays. Give `like=`, "
            "parameters of the same structure: `load(path, svi.get_params(svi.init(...)))`."
        )
    return built
