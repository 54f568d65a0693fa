# SPDX-License-Identifier: Apache-2.0
"""Batches that are not cut from arrays in memory: those of an iterable, and rows on disk.

A source yields one batch after the other, on the host. Which one belongs to a round is a function
of the number of rounds wherever that can be had: rows on disk are shuffled as arrays in memory are,
and an iterable that can begin anew is read up to where a run had come.
"""

import inspect
import json
import mmap
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from numpyro_ebm.errors import ModelError, check_integer
from numpyro_ebm.inputs import as_arrays, is_iterator
from numpyro_ebm.svi.minibatch import Minibatches, Orders
from numpyro_ebm.svi.places import set_place, tells_place, told_place

__all__ = ["IterableSource", "StoredRows", "find_source"]

MOST_SHORT = 100
"""How many batches in a row are left out for having few rows: each worker of a loader has one."""


def find_source(
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    batch_size: int | None,
    is_kept: bool = False,
) -> "IterableSource | StoredRows | None":
    """The source of batches among the arguments of a run; ``None`` if all are in memory.

    :param tuple args: arguments of model and guide. The first one may be an iterator, an iterable
        that is no pytree, such as a data loader, or a function without parameters that returns one.
    :param dict kwargs: keyword arguments.
    :param int batch_size: rows in a batch, or ``None``. With it, arrays on disk stay there.
    :param bool is_kept: whether the run writes checkpoints.
    :raises ModelError: if an iterator stands in another place, ``batch_size`` would cut the batches
        of an iterable, or a checkpoint could not say where an iterator was.
    """
    inside = args[:1] if args and not is_iterator(args[0]) else ()
    others = (*inside, *args[1:], *kwargs.values())
    if any(map(is_iterator, jax.tree.leaves(others, is_leaf=is_iterator))):
        raise ModelError(
            "EnergySVI.run: an iterator of batches takes the place of the first argument. Where "
            "several arguments change from batch to batch it yields tuples: `(data, covariates)`."
        )
    epoch = _epoch_of(args[0]) if args else None
    if epoch is not None:
        if batch_size is not None:
            raise ModelError(
                "EnergySVI.run: batches of an iterable are taken as they come, and `batch_size` "
                "would cut them once more. Leave it out."
            )
        return IterableSource(args[0], epoch, args[1:], kwargs, is_kept)
    if batch_size is not None and any(map(_is_stored, jax.tree.leaves((args, kwargs)))):
        check_integer("EnergySVI.run", batch_size=batch_size)
        return StoredRows(args, kwargs, batch_size)
    return None


class IterableSource:
    """Batches of an iterable, again from the first one where it ends, if it can begin anew.

    - **num_rows** - ``None``: how many rows there are is not known.
    - **form** - structure, shapes and types of the first batch, once it was read.

    :param source: the first argument of a run.
    :param epoch: what returns an iterable of the batches of an epoch.
    :param tuple others: the other arguments, which are the same in all rounds.
    :param dict kwargs: keyword arguments, likewise.
    :param bool is_kept: whether it is asked where it is.
    :raises ModelError: if it is, and is an iterator that cannot tell.
    """

    num_rows = None

    def __init__(
        self,
        source: Any,
        epoch: Callable[[], Iterable[Any]],
        others: tuple[Any, ...],
        kwargs: dict[str, Any],
        is_kept: bool = False,
    ):
        if is_kept and is_iterator(source) and not tells_place(source):
            raise ModelError(
                "EnergySVI.run: a run that goes on from a checkpoint has to find its batch again, "
                f"and a {type(source).__name__} can neither begin anew nor say where it is. Pass "
                "an iterable, or a function that makes the iterator."
            )
        self._is_kept = is_kept
        self._source, self._epoch, self._others, self._kwargs = source, epoch, others, kwargs
        self._iterator: Any = None
        self.form: _Form | None = None
        self._num_read = self._num_short = 0

    def first(
        self, step: int, position: str | None = None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments and keyword arguments of the first batch.

        :param int step: rounds that were taken before. Their batches are read and left out; an
            iterator goes on from where it is.
        :param position: what :meth:`position` told, which spares the reading.
        :raises ModelError: if there is none.
        """
        told = json.loads(position or "{}")
        if told:
            self._restore(told["state"])
        self._num_read = told.get("read", step if self._passes_once else 0)
        self._batches = self._of_one_form(told.get("rows"))
        for _ in range(step - self._num_read):
            next(self._batches, None)
        self._peeked = next(self._batches, None)
        if self._peeked is None:
            raise ModelError("EnergySVI.run: the iterable yields no batch.")
        return (*self._peeked, *self._others), self._kwargs

    def read(self, rng_key: jax.Array) -> Iterator[list[np.ndarray]]:
        """The arrays of one batch after the other, that of :meth:`first` first.

        :param rng_key: not used; an iterable has an order of its own.
        :raises ModelError: at a batch of another form.
        """
        del rng_key
        yield jax.tree.leaves(self._peeked)
        yield from map(jax.tree.leaves, self._batches)

    def position(self) -> str | None:
        """Where it is, if the source or its iterator can tell.

        See :mod:`~numpyro_ebm.svi.places`. It is asked only if there will be checkpoints.
        """
        if not self._is_kept:
            return None
        state = told_place(self._source, self._iterator)
        rows = None if self.form is None else self.form.rows
        told = {"read": self._num_read, "rows": rows, "state": state}
        return None if state is None else json.dumps(told)

    def minibatches(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Minibatches:
        """How the arguments of a round are made.

        :param tuple args: arguments of the first batch.
        :param dict kwargs: keyword arguments.
        """
        num_streamed = len(jax.tree.leaves(self._peeked))
        streamed = [i < num_streamed for i in range(len(jax.tree.leaves((args, kwargs))))]
        rows = 1 if self.form is None else self.form.rows
        return Minibatches.streamed(args, kwargs, streamed, rows, rows)

    @property
    def _passes_once(self):
        return is_iterator(self._source)

    def _iterable(self):
        """The iterator of the epoch that is being read."""
        if self._iterator is None:
            epoch = self._epoch()
            if _is_of_numbers(epoch) or isinstance(epoch, dict) or not hasattr(epoch, "__iter__"):
                raise ModelError(
                    "EnergySVI.run: a function that makes batches returns an iterator or an "
                    f"iterable of them, as a generator does, got a {type(epoch).__name__}."
                )
            self._iterator = iter(epoch)
        return self._iterator

    def _restore(self, state):
        if not any(set_place(find(), state) for find in (lambda: self._source, self._iterable)):
            raise ModelError(
                "EnergySVI.run: a checkpoint says where its batches were, and this source cannot "
                f"go there: {type(self._source).__name__} has no `load_state_dict` and no "
                "`set_state`."
            )

    def _all(self):
        found = True
        while found:
            found = False
            for batch in self._iterable():
                found = not self._passes_once
                yield batch
            self._iterator = None

    def _of_one_form(self, rows):
        for batch in self._all():
            batch = _on_host(batch)
            form = _Form.of(batch)
            if self.form is None and rows in (None, form.rows):
                self.form = form
            if form == self.form:
                self._num_read, self._num_short = self._num_read + 1, 0
                yield batch
                continue
            full = rows if self.form is None else self.form.rows
            self._num_short += 1
            is_short = full is not None and form.rows < full and form.shortens(self.form)
            if not is_short or self._num_short > MOST_SHORT:
                first = f"had {full} rows" if self.form is None else f"was {self.form}"
                raise ModelError(
                    f"EnergySVI.run: a batch is {form} and the first one {first}. All batches have "
                    "one form; only one with fewer rows, as the last of an epoch, is left out."
                )


class StoredRows:
    """Minibatches of arrays on disk (``np.memmap``, or chunked ones as of h5py and zarr).

    Batches are those of the same arrays in memory: drawn without replacement, in a new order every
    epoch, which is a function of the run's key.

    - **num_rows** - N, all rows.

    :param tuple args: arguments of a run.
    :param dict kwargs: keyword arguments.
    :param int batch_size: rows in a batch.
    :raises ModelError: if arrays on disk have other numbers of rows, or fewer than a batch.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], batch_size: int):
        self._leaves, self._structure = jax.tree.flatten((args, kwargs))
        lengths = {x.shape[0] for x in self._leaves if _is_stored(x)}
        self.num_rows = max(lengths)
        if len(lengths) > 1 or self.num_rows < batch_size:
            raise ModelError(
                f"EnergySVI.run: the arrays on disk have {sorted(lengths)} rows; all of them are "
                f"cut into batches of {batch_size}, so that they need one number of rows, and as "
                "many as that."
            )
        self._streamed = [
            hasattr(x, "shape") and len(x.shape) > 0 and x.shape[0] == self.num_rows
            for x in self._leaves
        ]
        self._batch_size = batch_size

    def first(
        self, step: int, position: str | None = None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments and keyword arguments with the first rows, by which a model is read.

        :param int step: rounds that were taken before.
        :param position: not used.
        """
        del position
        self._step, rows = step, np.arange(self._batch_size)
        leaves = [
            _rows_of(x, rows) if cut else x
            for x, cut in zip(self._leaves, self._streamed, strict=True)
        ]
        args, kwargs = jax.tree.unflatten(self._structure, leaves)
        self._plan = self.minibatches(args, kwargs)
        return args, kwargs

    def read(self, rng_key: jax.Array) -> Iterator[list[np.ndarray]]:
        """The arrays of one batch after the other.

        :param rng_key: key of the run, of which the order of the rows is a function.
        """
        orders, cut, step = Orders(rng_key, self.num_rows), self._streamed, self._step
        arrays = [x for x, is_cut in zip(self._leaves, cut, strict=True) if is_cut]
        whole = np.arange(self.num_rows)[None]
        while True:
            indices = self._plan.indices(orders, step, 1)
            (rows,) = whole if indices is None else indices
            yield [_rows_of(x, rows) for x in arrays]
            step += 1

    def position(self) -> None:
        """``None``: the step says it all."""

    def minibatches(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Minibatches:
        """How the arguments of a round are made; as of :class:`IterableSource`."""
        return Minibatches.streamed(
            args, kwargs, self._streamed, self._batch_size, self.num_rows, self.num_rows
        )


class _Form(NamedTuple):
    """Structure, shapes and types of the arrays of a batch."""

    structure: Any
    arrays: tuple[tuple[str, str, tuple[int, ...]], ...]

    @classmethod
    def of(cls, batch):
        found, structure = jax.tree_util.tree_flatten_with_path(batch)
        names = [jax.tree_util.keystr(path[1 if len(batch) == 1 else 0 :]) for path, _ in found]
        arrays = zip(names, (x for _, x in found), strict=True)
        return cls(structure, tuple((name, str(x.dtype), x.shape) for name, x in arrays))

    @property
    def rows(self):
        """Rows of a batch, those of the first of its arrays that has any."""
        return next(shape[0] for _, _, shape in self.arrays if shape)

    def shortens(self, other):
        """Whether it may differ from another form by its rows alone; ``None`` is any form."""
        mine, its = (
            None if x is None else [(name, dtype, shape[1:]) for name, dtype, shape in x.arrays]
            for x in (self, other)
        )
        return its is None or mine == its

    def __str__(self):
        arrays = (f"{name} {dtype}{list(shape)}".strip() for name, dtype, shape in self.arrays)
        return ", ".join(arrays)


def _on_host(batch):
    """A batch as a tuple of arguments, of arrays of NumPy."""
    args = tuple(batch) if isinstance(batch, tuple | list) else (batch,)
    arrays = jax.tree.map(_to_numpy, as_arrays(args)[0])
    if not any(x.ndim for x in jax.tree.leaves(arrays)):
        raise ModelError(
            f"EnergySVI.run: a batch, a {type(batch).__name__}, holds no array with rows on its "
            "leading axis. Have the loader put rows together, as `.batch(256)` or `batch_size=256` "
            "does in most of them; and make arrays of lists of numbers, `numpy.asarray(batch)`."
        )
    return arrays


def _to_numpy(x):
    x = np.asarray(x)
    if x.dtype.kind in "OSU":
        raise ModelError(
            f"EnergySVI.run: a batch holds {x.dtype} values. Batches are arrays of numbers, or "
            "tuples of them for several arguments; strings and objects stay outside."
        )
    return x


def _rows_of(x, rows):
    """``x[rows]``, read in the order in which they lie on disk."""
    order = np.argsort(rows)
    is_file = isinstance(x, np.memmap) and isinstance(x.base, mmap.mmap) and x.mode != "c"
    if is_file and x.filename is not None and x.flags.c_contiguous:
        found = _from_file(x, rows[order])
    else:
        found = np.asarray(x[rows[order]])
    result = np.empty_like(found)
    result[order] = found
    return result


def _from_file(x, rows):
    """The same from the file: pages that are mapped would come to fill the process's memory."""
    found = np.empty((len(rows), *x.shape[1:]), x.dtype)
    as_bytes = found.reshape(len(rows), -1).view(np.uint8)
    with open(x.filename, "rb", buffering=0) as file:
        for row, part in zip(rows, as_bytes, strict=True):
            file.seek(x.offset + int(row) * x.strides[0])
            if file.readinto(part.data) != part.size:
                raise OSError(f"{x.filename} is shorter than the {len(x)} rows that were mapped")
    return found


def _is_stored(x):
    return isinstance(x, np.memmap) or (hasattr(x, "chunks") and hasattr(x, "dtype"))


def _is_of_numbers(x):
    return hasattr(x, "dtype") or hasattr(x, "__array__")


def _epoch_of(x) -> Any:
    """What makes an iterable of batches of the first argument of a run, or ``None``."""
    if x is None or _is_of_numbers(x) or isinstance(x, str | bytes | set | frozenset | type):
        return None
    if is_iterator(x):
        return lambda: x
    leaves = jax.tree.leaves(x)
    if len(leaves) != 1 or leaves[0] is not x:  # a pytree: a batch itself, or a network
        return None
    if hasattr(x, "keys"):
        raise ModelError(
            f"EnergySVI.run: a {type(x).__name__} holds arrays by their names, and is no iterable "
            "of batches. Pass one of them, or a dict: `{name: x[name] for name in x}`."
        )
    if hasattr(x, "__iter__"):
        return lambda: x
    return x if callable(x) and _takes_nothing(x) else None


def _takes_nothing(function):
    try:
        parameters = inspect.signature(function).parameters.values()
    except (ValueError, TypeError):
        return False
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return all(p.default is not p.empty or p.kind in variadic for p in parameters)
