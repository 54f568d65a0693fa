# SPDX-License-Identifier: Apache-2.0
r"""Whether the rows of a model are apart, and whether they share their normalizer.

.. math:: \frac{∂ E_i}{∂ v_j} = 0 \quad (i \neq j), \qquad E_i(v) = E_j(v)

Rows are independent draws of one density each: objectives average over them, kernels move and
accept them one by one, and log Z is that of one row. An energy that subtracts the mean of the batch
has another normalizer. Where a row's energy reads anything else that differs from row to row, be it
an argument, an array that the model closes over, a parameter of every group or the index of a
plate, every row has a normalizer of its own.

Both are read off the operations of the energy, without running it
(:mod:`~numpyro_ebm.program.row_axes`). Rows that are not proved to be alike count as different.
Where an operation only lays rows out anew, or is not known, a coupling is looked for by evaluation
(:mod:`~numpyro_ebm.model.row_trials`).
"""

import jax.numpy as jnp
import numpy as np

from numpyro_ebm._compat import not_jax_tracer
from numpyro_ebm.errors import ModelError
from numpyro_ebm.model.row_model import RowModel
from numpyro_ebm.model.row_trials import coupled_terms, row_axis_of
from numpyro_ebm.program.row_axes import follow_rows, follow_rows_of
from numpyro_ebm.program.rows import MIXED, Rows

__all__ = ["check_row_argument", "check_rows", "check_rows_alike"]


def check_rows(row_model: RowModel) -> None:
    """Raise if a row depends on the values of other rows, and note what tells rows apart.

    :param RowModel row_model: the model; its ``covariates`` are set.
    :raises ModelError: naming the energy and what to write instead.
    """
    if row_model.num_rows < 2:
        return
    terms = _follow_terms(row_model)
    doubtful = [name for name, x in terms.items() if x.axis is MIXED]
    certain = [name for name in doubtful if terms[name].note is not None]
    for name in certain or (coupled_terms(row_model, doubtful) if doubtful else ()):
        kind = "energy" if name in row_model.energies else "site"
        raise ModelError(
            f"The {kind} '{name}' of a row depends on other rows of the plate '{row_model.plate}' "
            f"({_reason(terms[name].note)}). Rows are independent draws, and their normalizer is "
            "that of one row. Put coordinates that interact into one row, as event dimensions "
            "(`event_shape=`), and compute statistics of the data outside the model."
        )
    labels = frozenset().union(*(x.apart for x in terms.values() if x.axis is not MIXED))
    labels |= {f"what '{name}' does with its rows, which is not followed" for name in doubtful}
    row_model.covariates = sorted(labels)


def check_rows_alike(row_model: RowModel, who: str, remedy: str) -> None:
    """Raise if rows have densities, and so normalizers, of their own.

    :param RowModel row_model: the model.
    :param str who: who needs them alike, and why.
    :param str remedy: what to do instead, a sentence.
    :raises ModelError: naming what tells the rows apart.
    """
    if row_model.covariates:
        raise ModelError(
            f"{who}, but every row has a density and a log Z of its own, because its energy reads "
            f"what differs from row to row: {', '.join(row_model.covariates)}. {remedy}"
        )


def check_row_argument(row_model: RowModel, name: str) -> None:
    """Raise if a row reads what an argument of shape (rows,) has for other rows.

    :param RowModel row_model: the model, read with that argument.
    :param str name: the keyword argument.
    :raises ModelError: naming the energy and what to write instead.
    """
    traced = row_model.traced
    labels = [k for k, x in traced.arguments.arrays.items() if x is row_model.kwargs[name]]
    if row_model.num_rows < 2 or not labels or not traced.takes_arrays:
        return
    values = {k: site.value for k, site in row_model.sites.items()}
    data = {**row_model.plates, **row_model.parameters, **row_model.visible_values, **values}
    data |= {k: site.value for k, site in row_model.observed.items()}
    names = []

    def terms(x):
        found = traced.with_arrays({labels[0]: x}).evaluate("terms", data)
        names[:] = sorted(found)
        return [found[name] for name in names]

    states = follow_rows(terms, row_model.kwargs[name], [Rows(0)])
    for term, rows in zip(names, states, strict=True):
        if rows.axis is MIXED and rows.note is not None:
            raise ModelError(
                f"The energy '{term}' of a row reads the '{name}' of other rows "
                f"({_reason(rows.note)}). It is a number, or an array of shape (rows,): with event "
                f"dimensions behind the rows write `jnp.asarray({name})[..., None]`."
            )


def _reason(note):
    if note is None:
        return "by a difference of neighbours, say; found by evaluation"
    _, name = note
    if name.startswith(("gather", "scatter")):
        return f"a `{name}` looks them up by number: an index, or a sum over groups"
    return f"a `{name}` goes over them, as in a mean over the rows"


def _follow_terms(row_model):
    """What every term has to do with the rows."""
    closed, operands, names = row_model.terms_program()
    labels, states = row_model.traced.arguments.names, []
    for role, name, x in operands:
        if role in ("visible", "latent") and name not in row_model.observed:
            states.append(Rows(row_axis_of(row_model.sites[name], x, row_model)))
        elif role == "plate" and _counts(x):
            states.append(Rows.counted(0, WORDS[role].format(name)))
        elif role is None:  # nothing reads it
            states.append(Rows())
        else:
            words = WORDS[role].format(labels.get(name, name))
            states.append(Rows.data(jnp.shape(x), words))
    return dict(zip(names, follow_rows_of(closed, states), strict=True))


WORDS = {
    "param": "the parameter '{}'",
    "prior": "the parameter '{}'",
    "plate": "the indices of the plate '{}'",
    "mutable": "the state '{}' of a network",
    "visible": "the observed site '{}'",
    "latent": "the observed site '{}'",
    "array": "{}",
}
"""What a label says, by role."""


def _counts(x):
    return not_jax_tracer(x) and np.array_equal(x, np.arange(len(x)))
