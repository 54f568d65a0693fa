# SPDX-License-Identifier: Apache-2.0
"""Shuffled minibatches on the device, a function of the run's key and the step alone."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from numpyro_ebm.errors import ModelError
from numpyro_ebm.program.draws import at
from numpyro_ebm.svi.shuffle import shuffled

__all__ = ["Minibatches"]

SHUFFLE_STREAM = 0x5EED
"""Folded into the run's key, so that shuffling does not share keys with the rounds."""


class Minibatches(NamedTuple):
    """How the arguments of model and guide are cut into minibatches; hashable and static.

    - **num_rows, batch_size** - rows in all and in a batch; equal where nothing is cut.
    - **tree** - structure of ``(args, kwargs)``.
    - **kinds** - for each leaf: ``"rows"`` (cut), ``"array"`` (passed) or ``"static"``.
    - **static** - the leaves that are not arrays.
    - **stable_update, forward_mode** - options of the rounds.
    - **total_rows** - rows of the data plate, before any subsampling of the model's own.
    """

    num_rows: int
    batch_size: int
    tree: Any
    kinds: tuple
    static: tuple = ()
    stable_update: bool = False
    forward_mode: bool = False
    total_rows: int | None = None

    @classmethod
    def of(cls, row_model, args, kwargs, batch_size):
        """Plan the minibatches of a run.

        :param RowModel row_model: the model, read with all rows.
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
        if batch_size is None:
            return cls(num_rows, num_rows, tree, kinds, total_rows=row_model.total_rows)
        if not isinstance(batch_size, int) or not 1 <= batch_size <= num_rows:
            raise ModelError(
                f"`batch_size` must be an integer from 1 to the {num_rows} rows of the data plate "
                f"'{row_model.plate}', got {batch_size!r}."
            )
        if row_model.total_rows != num_rows:
            raise ModelError(
                f"The plate '{row_model.plate}' has a `subsample_size` of its own; drop it or drop "
                "`batch_size`."
            )
        if batch_size == num_rows:
            return cls(num_rows, num_rows, tree, kinds, total_rows=num_rows)
        kinds = tuple(
            "rows" if kind == "array" and jnp.ndim(x) > 0 and len(x) == num_rows else kind
            for kind, x in zip(kinds, leaves, strict=True)
        )
        if "rows" not in kinds:
            raise ModelError(
                f"`batch_size` cuts the array arguments whose leading axis has the {num_rows} rows "
                f"of the data plate '{row_model.plate}', and there is none among them."
            )
        return cls(num_rows, batch_size, tree, kinds, total_rows=num_rows)

    def resized(self, batch_size):
        """The same arguments in batches of another size; all rows where there are not as many."""
        if self.batch_size == self.num_rows or batch_size < self.num_rows:
            return self._replace(batch_size=min(batch_size, self.num_rows))
        kinds = tuple("array" if kind == "rows" else kind for kind in self.kinds)
        return self._replace(batch_size=self.num_rows, kinds=kinds)

    def split(self, args, kwargs):
        """The array leaves of the arguments, and the static ones."""
        leaves = list(zip(self.kinds, jax.tree.leaves((args, kwargs)), strict=True))
        arrays = [jnp.asarray(x) for kind, x in leaves if kind != "static"]
        return arrays, tuple(x for kind, x in leaves if kind == "static")

    def indices(self, rng_key, first_step, num_steps):
        """Row indices of the batches of consecutive steps, of shape (num_steps, batch_size).

        Every epoch is a fresh permutation; rows that do not fill a batch wait for the next epoch.
        """
        if self.batch_size == self.num_rows:
            return None
        per_epoch = self.num_rows // self.batch_size
        steps = first_step + jnp.arange(num_steps)
        position = (steps % per_epoch)[:, None] * self.batch_size + jnp.arange(self.batch_size)
        rng_key = jax.random.fold_in(rng_key, SHUFFLE_STREAM)
        num_epochs = (num_steps - 1) // per_epoch + 2
        return shuffled(rng_key, steps // per_epoch, position, self.num_rows, num_epochs)

    def batch(self, arrays, indices, i):
        """Arguments and keyword arguments of the i-th step of a chunk."""
        arrays, static = iter(arrays), iter(self.static)
        leaves = []
        for kind in self.kinds:
            if kind == "static":
                leaves.append(next(static))
            elif kind == "rows":
                # In bounds by construction; a check would cost a pass over the batch.
                rows = next(arrays).at[at(indices, i)]
                leaves.append(rows.get(mode="promise_in_bounds", wrap_negative_indices=False))
            else:
                leaves.append(next(arrays))
        return jax.tree.unflatten(self.tree, leaves)


def _is_array(x):
    return hasattr(x, "shape") and hasattr(x, "dtype")
