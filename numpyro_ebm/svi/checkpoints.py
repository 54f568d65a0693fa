# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run: all that it needs to go on bit for bit, written by Orbax while it runs.

A checkpoint is a folder of arrays and a table of contents in JSON; reading it runs no code. Orbax
writes it in the background, and gives it its name when it is whole: whoever kills the process loses
the rounds since the last one.
"""

import os
from collections.abc import Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.infer.svi import SVIRunResult

from numpyro_ebm.errors import ModelError, check_integer, check_positive
from numpyro_ebm.signatures import Checked
from numpyro_ebm.svi.saved import as_it_was, packed, unpacked
from numpyro_ebm.svi.state import EnergySVIRunResult

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None

__all__ = ["Checkpoint", "load_checkpoint"]


class Checkpoint(Checked):
    """Where a run keeps its checkpoints, and how many: for ``EnergySVI.run(..., checkpoint=...)``.

    A run that finds one there goes on from the latest, and ends where it would have ended without
    having been stopped, bit for bit: the same command serves to begin and to go on. ``num_steps``
    counts the rounds before. :func:`~numpyro_ebm.load` reads the fit of the latest.

    A checkpoint is written every so many rounds or seconds, and when the run ends, in the
    background. It needs Orbax: ``pip install "numpyro-ebm[checkpoints]"``.

    :param path: a folder of the run's own, which is made if it is not there.
    :param int every: rounds between two checkpoints.
    :param float seconds: seconds between two, where ``every`` is not given.
    :param int keep: how many of the latest are kept.
    :param int keep_best: how many of those with the lowest loss are kept besides. It is the mean
        over the rounds since the checkpoint before, and means little where the objective's value is
        no loss (:class:`~numpyro_ebm.ContrastiveDivergence`).
    :raises ModelError: if an option is out of range, or Orbax is not installed; from ``run``, if
        another run writes there, or what is there is of a run with another key, model, optimiser,
        objective, number of rows, ``batch_size`` or ``ema``, or cannot be read.

    **Example**

    >>> import tempfile, jax, jax.numpy as jnp, numpyro, optax
    >>> import numpyro_ebm as ebm
    >>> def gaussian(data):
    ...     mean = numpyro.param("mean", 0.0)
    ...     with numpyro.plate("data", len(data)):
    ...         v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
    ...         ebm.energy("E", 0.5 * (v - mean) ** 2)
    >>> svi = ebm.EnergySVI(gaussian, None, optax.adam(0.1), ebm.ScoreMatching())
    >>> folder = ebm.Checkpoint(tempfile.mkdtemp(), every=10)
    >>> options = {"checkpoint": folder, "progress_bar": False}
    >>> fit = svi.run(jax.random.key(0), 20, jnp.arange(5.0), **options)
    >>> longer = svi.run(jax.random.key(0), 50, jnp.arange(5.0), **options)
    >>> len(longer.losses), bool((longer.losses[:20] == fit.losses).all())
    (50, True)
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        every: int | None = None,
        seconds: float = 60.0,
        keep: int = 3,
        keep_best: int = 0,
    ):
        if not isinstance(path, str | os.PathLike):
            raise ModelError(f"Checkpoint: `path` must be the path of a folder, got {path!r}.")
        if every is not None:
            check_integer("Checkpoint", every=every)
        check_positive("Checkpoint", seconds=seconds)
        check_integer("Checkpoint", keep=keep)
        check_integer("Checkpoint", minimum=0, keep_best=keep_best)
        self.path = Path(path).absolute()
        self.every = every
        self.seconds = None if every is not None else seconds
        self._keep = keep, keep_best
        self._manager: Any = None
        self._lock: int | None = None
        self._failed = False
        self._told = 0
        _orbax()

    @classmethod
    def of(cls, x: "Checkpoint | str | os.PathLike[str] | None") -> "Checkpoint | None":
        """A checkpoint with defaults at a path; or what it was."""
        return x if x is None or isinstance(x, Checkpoint) else cls(x)

    def __enter__(self) -> "Checkpoint":
        ocp, policies = _orbax()
        keep, keep_best = self._keep
        kept = [policies.LatestN(keep)]
        if keep_best:
            kept.append(
                policies.BestN(
                    get_metric_fn=lambda metrics: metrics["loss"],
                    reverse=True,
                    n=keep_best,
                    keep_checkpoints_without_metrics=False,
                )
            )
        lock = _locked(self.path)
        try:
            self._manager = ocp.CheckpointManager(
                self.path,
                options=ocp.CheckpointManagerOptions(
                    cleanup_tmp_directories=True,
                    preservation_policy=policies.AnyPreservationPolicy(kept),
                ),
            )
        except BaseException:
            _unlock(lock)
            raise
        self._lock, self._failed = lock, False
        return self

    def __exit__(self, *error: Any) -> None:
        try:
            told = self._failed or error[0] is not None
            with suppress(Exception) if told else nullcontext():  # it says so once more
                self._manager.close()
        finally:
            _unlock(self._lock)
            self._manager = self._lock = None

    def latest(self, rng_key: jax.Array) -> tuple[EnergySVIRunResult, dict[str, Any]] | None:
        """What is there: the fit, and what else is known of its run.

        :param rng_key: key that the run was given.
        :raises ModelError: if a run with another key left it.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        fit, contents = _read_step(self._manager, step, self.path, None)
        if contents["run_key"] != _words(rng_key):
            raise ModelError(
                f"EnergySVI.run: the checkpoint in {self.path} is of a run with another random "
                "key. Give the same key to go on with it, or another folder to begin anew."
            )
        self._told = len(fit.losses)
        return fit, contents

    def check(self, contents: dict[str, Any], settings: dict[str, Any]) -> None:
        """Raise :class:`ModelError` if a run with other settings left what is there.

        :param contents: as :meth:`latest` found them.
        :param settings: of this run, by name.
        """
        left = contents["settings"]
        differ = [f"{k} {left[k]} and not {x}" for k, x in settings.items() if left[k] != x]
        if differ:
            raise ModelError(
                f"EnergySVI.run: the checkpoint in {self.path} is of a run with "
                f"{', '.join(differ)}, which would have come to something else. Go on as it began, "
                "or in another folder from its state: `init_state=load(folder).state`."
            )

    def finish(self) -> None:
        """Wait for what is written in the background."""
        with self._noting_failures():
            self._manager.wait_until_finished()

    @contextmanager
    def _noting_failures(self):
        try:
            yield
        except Exception:
            self._failed = True
            raise

    def write(
        self,
        rng_key: jax.Array,
        fit: SVIRunResult,
        position: str | None,
        settings: dict[str, Any],
    ) -> None:
        """Write a checkpoint, in the background.

        :param rng_key: key that the run was given.
        :param fit: the fit so far.
        :param position: where its batches are.
        :param settings: what a run that goes on has to have as this one; see :meth:`check`.
        """
        done = len(fit.losses)
        if done == self._manager.latest_step() or not done:
            return
        ocp, _ = _orbax()
        arrays, contents = packed(fit)
        kinds = {name: _kind(x) for name, x in arrays.items()}
        contents |= {"kinds": kinds, "run_key": _words(rng_key), "position": position}
        contents["settings"] = settings
        numbered = {str(i): _plain(x) for i, x in enumerate(arrays.values())}
        losses = np.asarray(fit.losses[self._told :])
        losses = losses[np.isfinite(losses)]  # those of rounds that were undone are NaN
        loss = float(losses.mean()) if losses.size else float(np.finfo(float).max)
        self._told = done
        with self._noting_failures():
            self._manager.save(
                done,
                args=ocp.args.Composite(
                    arrays=ocp.args.PyTreeSave(numbered), contents=ocp.args.JsonSave(contents)
                ),
                metrics={"loss": loss},
            )


def load_checkpoint(
    path: str | os.PathLike[str], like: Mapping[str, Any] | None = None
) -> EnergySVIRunResult:
    """The fit of the latest checkpoint in a folder; arguments as of :func:`~numpyro_ebm.load`.

    :raises ModelError: if there is none.
    """
    ocp, _ = _orbax()
    options = ocp.CheckpointManagerOptions(read_only=True)
    with ocp.CheckpointManager(Path(path).absolute(), options=options) as manager:
        step = manager.latest_step()
        if step is None:
            raise ModelError(f"load: there is no checkpoint in {os.fspath(path)}.")
        return _read_step(manager, step, path, like)[0]


def _read_step(manager, step, path, like):
    try:
        arrays, contents = _arrays_of(manager, step)
    except Exception as error:  # of Orbax, of many kinds
        raise ModelError(
            f"The checkpoint after {step} rounds in {os.fspath(path)} cannot be read "
            f"({type(error).__name__}: {str(error)[:200]}). Remove its folder, '{step}', to go on "
            "from the one before."
        ) from error
    return unpacked(arrays, contents, path, like), contents


def _arrays_of(manager, step):
    ocp, _ = _orbax()
    names = ocp.args.Composite(contents=ocp.args.JsonRestore())
    contents = manager.restore(step, args=names)["contents"]
    kinds = contents["kinds"]
    as_numpy = {str(i): ocp.RestoreArgs(restore_type=np.ndarray) for i in range(len(kinds))}
    arrays = manager.restore(
        step,
        args=ocp.args.Composite(arrays=ocp.args.PyTreeRestore(restore_args=as_numpy)),
    )["arrays"]
    pairs = enumerate(kinds.items())
    return {
        name: as_it_was(np.asarray(arrays[str(i)]), kind) for i, (name, kind) in pairs
    }, contents


def _locked(path):
    """A folder, made if it is not there, and held by this process; ``None`` where it cannot be.

    Orbax would take away the half-written checkpoint of a second run as one that was left there.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ModelError(f"Checkpoint: {path} is no folder, and a folder is needed.") from error
    if fcntl is None or jax.process_index():
        return None
    folder = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(folder)
        raise ModelError(
            f"EnergySVI.run: another run writes its checkpoints to {path}. Give this one a folder "
            "of its own."
        ) from error
    except OSError:  # of a file system without locks
        pass
    return folder


def _unlock(folder):
    if folder is not None:
        os.close(folder)


def _orbax():
    """Orbax, imported where it is first needed."""
    try:
        import orbax.checkpoint as ocp
        from orbax.checkpoint import checkpoint_managers
    except ImportError as error:
        raise ModelError(
            'Checkpoints are written by Orbax: `pip install "numpyro-ebm[checkpoints]"`.'
        ) from error
    return ocp, checkpoint_managers


def _is_key(x):
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _kind(x):
    return f"key {jax.random.key_impl(x)}" if _is_key(x) else "array"


def _plain(x):
    return jax.random.key_data(x) if _is_key(x) else jnp.asarray(x)


def _words(rng_key):
    """A key as a list of integers."""
    words = jax.random.key_data(rng_key) if _is_key(rng_key) else rng_key
    return np.ravel(np.asarray(words)).tolist()
