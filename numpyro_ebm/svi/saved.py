# SPDX-License-Identifier: Apache-2.0
"""A fit as arrays under their names in it, and a table of contents: what is written to files.

A state is put together again by the run that resumes from it, which knows its optimisers and its
objective.
"""

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.infer.svi import SVIRunResult

from numpyro_ebm.errors import ModelError
from numpyro_ebm.svi.state import EnergySVIRunResult, EnergySVIState

__all__ = ["SavedState", "as_it_was", "packed", "unpacked"]

FORMAT = 1


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


def packed(fit: SVIRunResult) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arrays of a fit by their names in it, and what else is to be known of it, as JSON.

    :param fit: what :meth:`EnergySVI.run` returned.
    :raises ModelError: if it is no fit.
    """
    if not isinstance(fit, SVIRunResult) or not isinstance(fit.state, EnergySVIState):
        raise ModelError(
            f"save: what `EnergySVI.run` returns is saved, got a {type(fit).__name__}."
        )
    parts = {"params": fit.params, "losses": fit.losses, **fit.state._asdict()}
    parts["ema_params"] = getattr(fit, "ema_params", None)
    arrays = {
        name + jax.tree_util.keystr(place): x
        for name, tree in parts.items()
        for place, x in jax.tree.leaves_with_path(tree)
    }
    return arrays, {
        "format": FORMAT,
        "objective": getattr(fit, "objective", ""),
        "structures": {name: _outline(parts[name]) for name in ("params", "ema_params")},
    }


def unpacked(
    arrays: dict[str, Any],
    contents: dict[str, Any],
    path: str | os.PathLike[str],
    like: Mapping[str, Any] | None = None,
) -> EnergySVIRunResult:
    """A fit from what :func:`packed` returned; arguments as of :func:`load`."""
    if contents["format"] != FORMAT:
        raise ModelError(
            f"load: {os.fspath(path)} has format {contents['format']}, and this version of "
            f"numpyro-ebm reads format {FORMAT}."
        )
    known = contents["structures"]["params"].get("dict", {})
    if like is not None and not like.keys() <= known.keys():
        raise ModelError(
            f"load: `like` has the parameters {sorted(like)}, and those of {os.fspath(path)} are "
            f"{sorted(known)}."
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


def as_it_was(x: np.ndarray, kind: str) -> jax.Array | np.ndarray:
    """An array that was written, as it was: a key, or of a type that NumPy does not know.

    One of 64 bits that JAX would round stays with NumPy: no run goes on from it by mistake.
    """
    what, _, name = kind.partition(" ")
    if what == "key":
        return jax.random.wrap_key_data(jnp.asarray(x), impl=name)
    x = x.view(jnp.dtype(name)) if what == "type" else x
    return jnp.asarray(x) if jax.dtypes.canonicalize_dtype(x.dtype) == x.dtype else x


def _is_of(part, key):
    return key == part or key.startswith((part + "[", part + "."))


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
