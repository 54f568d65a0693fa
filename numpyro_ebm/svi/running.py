# SPDX-License-Identifier: Apache-2.0
"""A run of EnergySVI: its batches, the state it starts from, its chunks, and how it ends."""

import os
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from numpyro_ebm.errors import ModelError, check_takes
from numpyro_ebm.program.devices import (
    everywhere,
    leading_sharding,
    partitioned_by_compiler,
    placed,
)
from numpyro_ebm.svi.checkpoints import Checkpoint
from numpyro_ebm.svi.ctrl_c import CtrlC, wait
from numpyro_ebm.svi.endings import Why, warn_of_end, warn_of_undone
from numpyro_ebm.svi.loop import Callback, Look, run_chunks
from numpyro_ebm.svi.minibatch import Batches
from numpyro_ebm.svi.resuming import steps_of
from numpyro_ebm.svi.saved import SavedState
from numpyro_ebm.svi.sources import IterableSource, StoredRows
from numpyro_ebm.svi.state import EnergySVIRunResult
from numpyro_ebm.svi.streamed import StreamedBatches

__all__ = ["Run", "opened"]


def opened(
    checkpoint: Checkpoint | str | os.PathLike[str] | None,
) -> AbstractContextManager[Checkpoint | None]:
    """A checkpoint that can be read and written, or ``None``."""
    found = Checkpoint.of(checkpoint)
    return nullcontext() if found is None else found


class Run:
    """A run, ready to take its rounds.

    :param svi: the :class:`~numpyro_ebm.EnergySVI`.
    :param rng_key: random key.
    :param int num_steps: number of rounds, with those before the checkpoint.
    :param kept: the open :class:`~numpyro_ebm.Checkpoint`, or ``None``.
    :param args: arguments, as ``run`` got them, and likewise ``kwargs``, ``batch_size``,
        ``sharding``, ``init_state`` and ``init_params``.
    :param source: where batches come from that are not in memory, or ``None``.
    :param options: ``stable``, ``forward_mode`` and ``ema``, as of
        :meth:`~numpyro_ebm.svi.compiled.CompiledRounds.chunk`.
    """

    def __init__(
        self,
        svi: Any,
        rng_key: jax.Array,
        num_steps: int,
        kept: Checkpoint | None,
        *,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        batch_size: int | None,
        source: IterableSource | StoredRows | None,
        sharding: Mesh | NamedSharding | None,
        init_state: Any,
        init_params: Any,
        **options: Any,
    ):
        self._svi, self._key, self._num_steps, self._kept = svi, rng_key, num_steps, kept
        self._options, position, self._before = options, None, np.zeros(0)
        contents, self._unwritten = None, None
        found = None if kept is None else kept.latest(rng_key)
        if kept is not None and found is not None:
            if init_state is not None:
                raise ModelError(
                    f"EnergySVI.run: there is a checkpoint in {kept.path} to go on from, and "
                    "`init_state`. Leave that out, or give another folder."
                )
            fit, contents = found
            position, init_state = contents["position"], fit.state
            self._before = np.asarray(fit.losses)
            if len(self._before) > num_steps:
                raise ModelError(
                    f"EnergySVI.run: the checkpoint in {kept.path} is of {len(self._before)} "
                    f"rounds, and `num_steps`, which counts them, is {num_steps}."
                )
        step = steps_of(init_state)
        if source is not None:
            args, kwargs = source.first(step, position)
        else:
            args, kwargs = partitioned_by_compiler("EnergySVI.run", (args, kwargs))
        with _about(source):
            state = svi._begin(rng_key, init_state, init_params, args, kwargs)
        traced, key = svi._plan.traced, state.rng_key
        spread = leading_sharding("EnergySVI.run", sharding, args, kwargs)
        if source is None:
            self._batches = Batches(traced.data_plate, args, kwargs, batch_size, key, spread)
        elif svi.num_rows is None and source.num_rows is None and traced.has_priors:
            raise ModelError(
                "EnergySVI.run: parameters have priors, which are weighed against all rows, and "
                "nobody knows how many rows an iterable has. Say it: `EnergySVI(..., num_rows=N)`."
            )
        else:
            left = num_steps - len(self._before)
            self._batches = StreamedBatches(
                source, args, kwargs, key, step, left, traced, svi.static_kwargs, spread
            )
        cut, ema = self._batches.minibatches, options["ema"]
        self._settings = {
            "rows": int(cut.num_rows),
            "batch_size": int(cut.batch_size),
            "ema": None if ema is None else float(ema),
        }
        if kept is not None and contents is not None:
            kept.check(contents, self._settings)
        state = self._complete(state, init_state, options["ema"])
        if spread is not None:  # what the objective keeps lies as the rows do
            own, rows = state.objective_state, state.marginal_state
            state = state._replace(objective_state=None, marginal_state=None)
            state = placed(state, everywhere(spread))
            state = state._replace(objective_state=own, marginal_state=rows)
        self._state = state

    def take(
        self, ctrl_c: CtrlC, progress_bar: bool, callback: Callback | None, every: int | None
    ) -> EnergySVIRunResult:
        """Take the rounds, and write the last checkpoint.

        :param CtrlC ctrl_c: what is heard of Ctrl-C; the others as of :meth:`EnergySVI.run`.
        """
        svi, kept, batches = self._svi, self._kept, self._batches

        def take_chunk(state, length, watched, seconds):
            taken = svi._compiled.chunk(state, batches, length, watched=watched, **self._options)
            batches.read_ahead(taken[1])
            wait(taken[1], seconds)
            return taken

        looks = []
        if callback is not None and every is not None:
            call = _with_losses_since(callback, every, len(self._before))
            looks.append(Look(ctrl_c.heard(call), every))
        if kept is not None:
            looks.append(Look(self._write, kept.every, kept.seconds))
        state, losses, svi._length, why = run_chunks(
            ctrl_c.heard(take_chunk),
            ctrl_c.heard(lambda state: batches.ready(int(state.step))),
            self._state,
            self._num_steps,
            svi._length,
            watched=self._options["stable"],
            progress_bar=progress_bar,
            looks=looks,
            before=self._before,
        )
        if ctrl_c.presses > 1:
            raise KeyboardInterrupt
        if kept is not None:
            self._write(state, losses[:-1] if why is Why.NOT_FINITE else losses, last=True)
        self._why = why
        return self._result(state, losses)

    def tell(self, ctrl_c: CtrlC, result: EnergySVIRunResult) -> None:
        """Warn of an end before the last round, or of what a look at the result finds."""
        why = self._why
        error = self._batches.error if why is Why.NO_BATCH else None
        if self._unwritten is not None:
            why, error = Why.NOT_WRITTEN, self._unwritten
        if error is not None and not len(result.losses):
            raise error
        if why in (Why.DONE, Why.CALLBACK):
            try:
                ctrl_c.heard(self._review)(result)
            except KeyboardInterrupt:
                if ctrl_c.presses > 1:
                    raise
                why = Why.INTERRUPTED
        ctrl_c.answered = True
        warn_of_end(why, result, self._num_steps, error)

    def _complete(self, state, init_state, ema):
        """The state with what the objective keeps, and with averages of the parameters."""
        svi = self._svi
        if init_state is not None:
            state = svi._compiled.with_kept(state, self._batches)
        elif svi.loss.keeps:
            state = svi._compiled.with_first_state(state, self._batches)
        if ema is not None and isinstance(state.ema, list):
            return state
        averages = None if ema is None else svi._round().unconstrained(state)
        if ema is not None and isinstance(state.ema, SavedState):
            averages = state.ema.part("ema", averages)
        return state._replace(ema=averages)

    def _result(self, state, losses):
        svi = self._svi
        result = EnergySVIRunResult(svi.get_params(state), state, jax.device_put(losses))
        averages = svi._round().ema_params(state)
        result.ema_params = None if averages is None else svi._stated(averages)
        result.objective = type(svi.loss).__name__
        return result

    def _write(self, state, losses, last=False):
        """Write a checkpoint; a run that cannot ends, with what it learned."""
        if self._kept is None or self._unwritten is not None:
            return True
        fit, where = self._result(state, losses), self._batches.position
        try:
            self._kept.write(self._key, fit, where, self._settings)
            if last:
                self._kept.finish()
        except ModelError:
            raise
        except Exception as error:  # of Orbax and of the disk, of many kinds
            self._unwritten = error
        return self._unwritten is not None

    def _review(self, result):
        """Say what there is to say of a run that took all its rounds."""
        svi, state = self._svi, result.state
        if self._options["stable"]:
            undone = int(np.isnan(result.losses).sum())
            warn_of_undone(result, undone, self._num_steps)
        if svi.loss.has_statistics(state.objective_state):
            svi._compiled.review(state, self._batches)
        svi.loss.review_state(state.objective_state)


@contextmanager
def _about(source):
    """Say of an error at the first batch what the batch was."""
    try:
        yield
    except Exception as error:
        if isinstance(source, IterableSource):
            error.add_note(f"The first batch of `EnergySVI.run` was {source.form}.")
        raise


def _with_losses_since(callback, every, done):
    """A callback that is told the losses since it was called before."""
    told = done - done % every
    words = "`callback` is called with (step, state, losses)"
    check_takes("EnergySVI.run", words, callback, (0, None, None))

    def call(state, losses):
        nonlocal told
        since, told = losses[told:].copy(), len(losses)
        answer = callback(int(state.step), state, since)
        if answer is not None and np.asarray(answer).dtype.kind != "b":
            raise ModelError(
                "EnergySVI.run: `callback` returns True to end the run, else False or nothing; it "
                f"returned a `{type(answer).__name__}`."
            )
        return answer

    return call
