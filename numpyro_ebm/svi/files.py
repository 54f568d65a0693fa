# SPDX-License-Identifier: Apache-2.0
"""A fit in a file: parameters, losses, and all that a run needs to go on bit for bit.

The file is a zip of NumPy arrays under their names in the fit, and a table of contents in JSON.
Reading it runs no code.
"""

import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.infer.svi import SVIRunResult

from numpyro_ebm.errors import ModelError
from numpyro_ebm.signatures import explaining
from numpyro_ebm.svi.checkpoints import load_checkpoint
from numpyro_ebm.svi.saved import as_it_was, packed, unpacked
from numpyro_ebm.svi.state import EnergySVIRunResult

__all__ = ["load", "save"]

CONTENTS = "contents.json"


@explaining
def save(path: str | os.PathLike[str], fit: SVIRunResult) -> None:
    """Write a fit to a file; whoever stops it leaves the file as it was.

    :param path: where to.
    :param fit: what :meth:`EnergySVI.run` returned. Parameters may be nested; networks of other
        libraries are written as their arrays.
    :raises ModelError: if it is no fit, some of it are no arrays, or there is no such folder.

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
    arrays, contents = packed(fit)
    if not Path(path).parent.is_dir():
        raise ModelError(f"save: there is no folder {Path(path).parent}. Make it first.")
    written = {key: _written(key, x) for key, x in arrays.items()}
    contents["kinds"] = {key: kind for key, (_, kind) in written.items()}
    partial = Path(f"{os.fspath(path)}.{os.getpid()}.partial")
    try:
        with zipfile.ZipFile(partial, "w") as file:
            file.writestr(CONTENTS, json.dumps(contents))
            for i, (x, _) in enumerate(written.values()):
                with file.open(f"{i}.npy", "w", force_zip64=True) as entry:
                    np.lib.format.write_array(entry, x, allow_pickle=False)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@explaining
def load(path: str | os.PathLike[str], like: Mapping[str, Any] | None = None) -> EnergySVIRunResult:
    """Read a fit from a file that :func:`save` wrote, or the latest checkpoint of a folder.

    :param path: where from; a folder is that of a :class:`~numpyro_ebm.Checkpoint`.
    :param like: parameters of the same structure, where networks of other libraries are among
        them: ``svi.get_params(svi.init(...))``.
    :return: the fit, with ``params``, ``losses``, ``ema_params``, and a ``state`` for the
        ``init_state`` of a run with the same model, guide, optimisers and objective.
    :raises ModelError: if it is not such a file, or ``like`` has other arrays.
    """
    if Path(path).is_dir():
        return load_checkpoint(path, like)
    try:
        with zipfile.ZipFile(path) as file:
            contents = json.loads(file.read(CONTENTS))
            arrays = {}
            for i, (key, kind) in enumerate(contents["kinds"].items()):
                with file.open(f"{i}.npy") as entry:
                    arrays[key] = as_it_was(
                        np.lib.format.read_array(entry, allow_pickle=False), kind
                    )
    except (zipfile.BadZipFile, KeyError, ValueError) as error:
        raise ModelError(f"load: {os.fspath(path)} is not a fit that `save` wrote.") from error
    return unpacked(arrays, contents, path, like)


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
