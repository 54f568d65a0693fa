# SPDX-License-Identifier: Apache-2.0
"""Batches that come one after the other, put on the device in blocks of many.

A block is as long as a fixed number of bytes allows, so that one compiled program takes rounds from
any of them. While the device takes the rounds of one block the host reads the next.
"""

import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding

from numpyro_ebm.errors import ModelError
from numpyro_ebm.keys import default_key
from numpyro_ebm.model.traced_model import TracedModel
from numpyro_ebm.program.compilation import compiled, compiler_options
from numpyro_ebm.program.devices import check_divides, everywhere, on_axis, placed
from numpyro_ebm.svi.minibatch import CHUNK, Minibatches
from numpyro_ebm.svi.sources import IterableSource, StoredRows

__all__ = ["StreamedBatches"]

BLOCK_BYTES = 16 * 2**20
"""Bytes of a block of batches, of which there are two at a time, and one on the host."""

SECONDS_OF_READING = 0.5
"""How long a block is filled while nothing runs."""


class _Block(NamedTuple):
    """Batches on the device: those of the rounds from ``start`` to before ``end``."""

    arrays: list[jax.Array]
    start: int
    end: int
    position: str | None


class StreamedBatches:
    """The arguments of a run whose batches come one after the other.

    It has the methods of :class:`~numpyro_ebm.svi.minibatch.Batches`, and

    - **error** - what was wrong with the batch after the last one, if something was.
    - **position** - where the source was before the current block, if it can tell.

    :param source: where the batches come from.
    :param tuple args: arguments with the first batch.
    :param dict kwargs: keyword arguments with the first batch.
    :param rng_key: key of the run.
    :param int step: rounds that were taken before.
    :param int num_steps: rounds of the run: no more batches are read.
    :param TracedModel traced: the model at the first batch.
    :param dict static_kwargs: arguments that the model has besides, whatever the batch.
    :param sharding: how the rows of a batch are spread over devices, or ``None``.
    """

    def __init__(
        self,
        source: IterableSource | StoredRows,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        rng_key: jax.Array,
        step: int,
        num_steps: int,
        traced: TracedModel,
        static_kwargs: dict[str, Any],
        sharding: NamedSharding | None = None,
    ):
        plan = source.minibatches(args, kwargs)
        self.minibatches = plan._replace(sharding=sharding)
        check_divides("EnergySVI.run", sharding, **{"rows of a batch": plan.batch_size})
        self._source, self._unread, self._static_kwargs = source, num_steps, static_kwargs
        leaves = zip(self.minibatches.kinds, jax.tree.leaves((args, kwargs)), strict=True)
        self._leaves = [(kind, x) for kind, x in leaves if kind != "static"]
        first = [np.asarray(x) for kind, x in self._leaves if kind == "step"]
        self._others = [
            None if kind == "step" else self._placed(jnp.asarray(x)) for kind, x in self._leaves
        ]
        self._first = self._among_others([self._placed(x[None], axis=1) for x in first])
        self._size = max(1, min(CHUNK, BLOCK_BYTES // max(sum(x.nbytes for x in first), 1)))
        self._like = [(x.shape, jnp.asarray(x).dtype) for x in first]
        self._reader, self._traced, self._next = source.read(rng_key), traced, step
        self.error: Exception | None = None
        self._are_possible: Any = None
        self._block, self._following = _Block([], step, step, None), None

    def ready(self, step: int) -> int:
        """How many rounds from this one on can be taken in one chunk; 0 where the batches end."""
        if step >= self._block.end:
            block = self._read(None) if self._following is None else self._following
            self._following = None
            if block.start < block.end:  # else the place that is told stays that of the last round
                self._block = block
        return self._block.end - step

    def chunk(self, step: int, length: int) -> tuple[list[jax.Array], Any]:
        """The batches on the device, and the place of that of a round among them."""
        del length
        return self._among_others(self._block.arrays), np.int32(step - self._block.start)

    def read_ahead(self, until: jax.Array) -> None:
        """Read the next block while a chunk runs, until its losses are there."""
        if self._following is None:
            self._following = self._read(until)

    def look(self, num_rows: int) -> tuple[list[jax.Array], Any, Minibatches]:
        """The first batch, which is all that can be looked at when a run is over."""
        del num_rows
        return self._first, np.int32(0), self.minibatches

    @property
    def position(self) -> str | None:
        return self._block.position

    def _placed(self, x, axis=None):
        """An array on the devices: its rows are spread, or it is on all of them."""
        sharding = self.minibatches.sharding
        if sharding is None:
            return jnp.asarray(x)
        where = everywhere(sharding) if axis is None else on_axis(sharding, axis)
        return placed(x, where)

    def _among_others(self, streamed):
        mine = iter(streamed)
        return [next(mine) if x is None else x for x in self._others]

    def _read(self, until):
        """A block of what comes next, which may be shorter, or empty where the batches end."""
        position, begin, count = self._source.position(), time.perf_counter(), 0
        block = [np.empty((self._size, *shape), dtype) for shape, dtype in self._like]
        while count < min(self._size, self._unread):
            batch = self._next_batch()
            if batch is None:
                break
            for rows, x in zip(block, batch, strict=True):
                rows[count] = x
            count += 1
            waited = time.perf_counter() - begin > SECONDS_OF_READING
            if waited if until is None else until.is_ready():
                break
        for rows in block:
            rows[count:] = 0
        arrays = [self._placed(x, axis=1) for x in block]
        count = self._possible(arrays, count)
        start, self._next, self._unread = self._next, self._next + count, self._unread - count
        return _Block(arrays, start, self._next, position)

    def _next_batch(self):
        if self.error is not None:
            return None
        try:
            return next(self._reader, None)
        except Exception as error:  # of the user's source; told when the rounds before are taken
            self.error = error
            return None

    def _possible(self, arrays, count):
        """How many of the batches can be the data of the model: what is wrong is kept."""
        if not count:
            return 0
        arrays = self._among_others(arrays)
        if self._are_possible is None:
            self._are_possible = compiled(self._look_at_all, arrays, options=compiler_options())
        right = np.asarray(self._are_possible(arrays))[:count]
        for i in np.flatnonzero(~right):
            args, kwargs = self.minibatches.batch(arrays, np.int32(i), 0)
            try:
                self._at(args, kwargs).check_data(default_key(), {})
            except ModelError as error:
                self.error = error
                return int(i)
        return count

    def _at(self, args, kwargs):
        kwargs = {**kwargs, **self._static_kwargs}
        traced = self._traced.rebound(self._traced.model, args, kwargs)
        return self._traced.at(args, kwargs, {}) if traced is None else traced

    def _look_at_all(self, arrays):
        def one(i):
            args, kwargs = self.minibatches.batch(arrays, np.int32(0), i)
            return self._at(args, kwargs).data_are_possible()

        return lax.map(one, jnp.arange(self._size))
