# SPDX-License-Identifier: Apache-2.0
"""Shuffled minibatches: a function of the run's key and the step alone.

The host draws the order of every epoch, and hands each chunk of rounds the rows of its batches;
the rows themselves are gathered on the device.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jax.typing import ArrayLike

from numpyro_ebm.errors import ModelError, check_integer
from numpyro_ebm.model.data_plate import DataPlate
from numpyro_ebm.objectives.plan import BatchRows
from numpyro_ebm.program.devices import check_divides, everywhere, placed
from numpyro_ebm.program.draws import at

__all__ = ["CHUNK", "Batches", "Minibatches", "Orders"]

CHUNK = 1024
"""The most rounds between two looks at the losses; each chunk is one compiled call."""

SHUFFLE_STREAM = 0x5EED
"""Part of the seeds, so that shuffling does not share random numbers with anything else."""


class Orders:
    """Random orders of the rows, one an epoch, drawn when they are first asked for.

    :param rng_key: key of the run.
    :param int num_rows: N, the number of rows.
    """

    def __init__(self, rng_key: jax.Array, num_rows: int):
        words = np.ravel(jax.random.key_data(rng_key)).tolist()
        self._seed, self._num_rows, self._kept = [SHUFFLE_STREAM, *words], num_rows, {}

    def __call__(self, epoch: int) -> np.ndarray:
        """The order of an epoch, a permutation of the rows."""
        if epoch not in self._kept:
            rng = np.random.default_rng([*self._seed, epoch])
            order = rng.permutation(np.arange(self._num_rows, dtype=np.int32))
            self._kept = {epoch: order}  # the next chunk may begin in the epoch of the last one
        return self._kept[epoch]


class Minibatches(NamedTuple):
    """How the arguments of model and guide are cut into minibatches; hashable and static.

    - **num_rows, batch_size** - rows in all and in a batch; equal where nothing is cut.
    - **tree** - structure of ``(args, kwargs)``.
    - **kinds** - for each leaf: ``"rows"`` (cut), ``"step"`` (batches, one after the other),
      ``"array"`` (passed) or ``"static"``.
    - **static** - the leaves that are not arrays.
    - **total_rows** - rows of the data plate, before any subsampling of the model's own.
    - **sharding** - how the rows of a batch are spread over devices, or ``None``.
    """

    num_rows: int
    batch_size: int
    tree: Any
    kinds: tuple[str, ...]
    static: tuple[Any, ...] = ()
    total_rows: int | None = None
    sharding: NamedSharding | None = None

    @classmethod
    def of(
        cls,
        row_model: DataPlate,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        batch_size: int | None,
    ) -> Self:
        """Plan the minibatches of a run.

        :param DataPlate row_model: the data plate, or the model, with all rows.
        :param tuple args: arguments with all rows.
        :param dict kwargs: keyword arguments with all rows.
        :param int batch_size: rows in a batch, or ``None``.
        :raises ModelError: if ``batch_size`` is not between 1 and the number of rows, or no
            argument has the rows on its leading axis, or the model subsamples its data plate
            itself.
        """
        num_rows = row_model.num_rows
        leaves, tree = jax.tree.flatten((args, kwargs))
        kinds = tuple("array" if _is_array(x) else "static" for x in leaves)
        static = tuple(x for kind, x in zip(kinds, leaves, strict=True) if kind == "static")
        whole = cls(num_rows, num_rows, tree, kinds, static, total_rows=row_model.total_rows)
        if batch_size is None:
            return whole
        check_integer("EnergySVI.run", batch_size=batch_size)
        if batch_size > num_rows:
            raise ModelError(
                f"`batch_size` must be at most the {num_rows} rows of the data plate "
                f"'{row_model.plate}', got {batch_size!r}."
            )
        if row_model.total_rows != num_rows:
            raise ModelError(
                f"The plate '{row_model.plate}' has a `subsample_size` of its own; drop it or drop "
                "`batch_size`."
            )
        if batch_size == num_rows:
            return whole
        kinds = tuple(
            "rows" if kind == "array" and jnp.ndim(x) > 0 and len(x) == num_rows else kind
            for kind, x in zip(kinds, leaves, strict=True)
        )
        if "rows" not in kinds:
            raise ModelError(
                f"`batch_size` cuts the array arguments whose leading axis has the {num_rows} rows "
                f"of the data plate '{row_model.plate}', and there is none among them."
            )
        return whole._replace(batch_size=batch_size, kinds=kinds)

    @classmethod
    def streamed(
        cls,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        streamed: Sequence[bool],
        batch_size: int,
        num_rows: int,
        total_rows: int | None = None,
    ) -> Self:
        """Plan the minibatches of a run that is handed them one after the other.

        :param tuple args: arguments with one batch.
        :param dict kwargs: keyword arguments with one batch.
        :param streamed: which of their leaves come anew in every round.
        :param int batch_size: rows in a batch.
        :param int num_rows: rows in all, where batches are drawn from them.
        :param int total_rows: rows in all, if that is known.
        """
        leaves, tree = jax.tree.flatten((args, kwargs))
        kinds = tuple(
            "step" if new else "array" if _is_array(x) else "static"
            for new, x in zip(streamed, leaves, strict=True)
        )
        static = tuple(x for kind, x in zip(kinds, leaves, strict=True) if kind == "static")
        return cls(num_rows, batch_size, tree, kinds, static, total_rows)

    def resized(self, batch_size: int) -> Self:
        """The same arguments in batches of another size; all rows where there are not as many."""
        if self.batch_size == self.num_rows or batch_size < self.num_rows:
            return self._replace(batch_size=min(batch_size, self.num_rows))
        kinds = tuple("array" if kind == "rows" else kind for kind in self.kinds)
        return self._replace(batch_size=self.num_rows, kinds=kinds)

    def indices(self, orders: Orders, first_step: int, num_steps: int) -> np.ndarray | None:
        """Row indices of the batches of consecutive steps, of shape (num_steps, batch_size).

        Every epoch is a fresh permutation; rows that do not fill a batch wait for the next epoch.

        :param Orders orders: the orders of the epochs.
        :param int first_step: the first of the steps.
        :param int num_steps: how many.
        :return: an array of NumPy, or ``None`` where every batch is all rows.
        """
        if self.batch_size == self.num_rows:
            return None
        per_epoch = self.num_rows // self.batch_size
        last_step, parts = first_step + num_steps - 1, []
        for epoch in range(first_step // per_epoch, last_step // per_epoch + 1):
            batches = orders(epoch)[: per_epoch * self.batch_size].reshape(per_epoch, -1)
            begin = max(first_step - epoch * per_epoch, 0)
            parts.append(batches[begin : last_step - epoch * per_epoch + 1])
        return np.concatenate(parts)

    def batch(
        self, arrays: Sequence[Any], indices: Any, i: ArrayLike
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments and keyword arguments of the i-th step of a chunk.

        :param arrays: the arrays among the leaves.
        :param indices: rows of each step, as of :meth:`indices`; of streamed batches, the place of
            the first one.
        :param i: which step.
        """
        rest, static = iter(arrays), iter(self.static)
        leaves = []
        for kind in self.kinds:
            if kind == "static":
                leaves.append(next(static))
            elif kind == "rows":
                # In bounds by construction; a check would cost a pass over the batch.
                rows = next(rest).at[at(indices, i)]
                rows = rows.get(mode="promise_in_bounds", wrap_negative_indices=False)
                leaves.append(self._spread(rows))
            elif kind == "step":
                leaves.append(self._spread(at(next(rest), indices + i)))
            else:
                leaves.append(next(rest))
        return jax.tree.unflatten(self.tree, leaves)

    def rows(self, indices: Any, i: ArrayLike) -> BatchRows | None:
        """Which rows of the data the batch of the i-th step has; ``None`` of streamed ones."""
        if "step" in self.kinds:
            return None
        index = jnp.arange(self.num_rows) if indices is None else at(indices, i)
        return BatchRows(index, self.num_rows)

    def _spread(self, rows):
        if self.sharding is None:
            return rows
        return lax.with_sharding_constraint(rows, self.sharding)


class Batches:
    """The arguments of a run, and how they are cut into minibatches.

    - **minibatches** - how they are cut.
    - **arrays** - the arrays among the arguments.
    - **error, position** - as of :class:`~numpyro_ebm.svi.streamed.StreamedBatches`: ``None``.

    :param DataPlate data_plate: the data plate, or a model, with all rows.
    :param tuple args: arguments with all rows.
    :param dict kwargs: keyword arguments with all rows.
    :param int batch_size: rows in a batch, or ``None``.
    :param rng_key: key of the run.
    :param sharding: how the rows are spread over devices, or ``None``.
    """

    error = position = None

    def __init__(
        self,
        data_plate: DataPlate,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        batch_size: int | None,
        rng_key: jax.Array,
        sharding: NamedSharding | None = None,
    ):
        plan = Minibatches.of(data_plate, args, kwargs, batch_size)
        self._orders = Orders(rng_key, plan.num_rows)
        leaves = zip(plan.kinds, jax.tree.leaves((args, kwargs)), strict=True)
        self.arrays = [jnp.asarray(x) for kind, x in leaves if kind != "static"]
        if sharding is not None:
            numbers = {"rows of data": plan.num_rows, "rows of a batch": plan.batch_size}
            check_divides("EnergySVI.run", sharding, **numbers)
            plan = plan._replace(sharding=sharding)
            whole = everywhere(sharding)
            of_rows = [x.ndim > 0 and len(x) == plan.num_rows for x in self.arrays]
            self.arrays = [
                placed(x, sharding if spread else whole)
                for x, spread in zip(self.arrays, of_rows, strict=True)
            ]
        self.minibatches = plan

    def indices(self, first_step: int, num_steps: int) -> np.ndarray | None:
        """As :meth:`Minibatches.indices`."""
        return self.minibatches.indices(self._orders, first_step, num_steps)

    def ready(self, step: int) -> int:
        """How many rounds from this one on can be taken in one chunk."""
        del step
        return CHUNK

    def chunk(self, step: int, length: int) -> tuple[list[jax.Array], Any]:
        """What :meth:`Minibatches.batch` takes, for so many rounds from this one on.

        Indices have one shape, for one program; those of rounds that are not taken are not drawn.
        """
        found = self.indices(step, length)
        if found is None:
            return self.arrays, None
        indices = np.zeros((CHUNK, self.minibatches.batch_size), found.dtype)
        indices[:length] = found
        return self.arrays, indices

    def read_ahead(self, until: jax.Array) -> None:
        """Read what comes next while a chunk runs, until its losses are there: nothing here."""

    def look(self, num_rows: int) -> tuple[list[jax.Array], Any, Minibatches]:
        """What :meth:`Minibatches.batch` takes for one batch of other rows, and that itself."""
        other = self.minibatches.resized(num_rows)
        return self.arrays, other.indices(self._orders, 0, 1), other


def _is_array(x):
    return hasattr(x, "shape") and hasattr(x, "dtype")
