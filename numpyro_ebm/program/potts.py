# SPDX-License-Identifier: Apache-2.0
r"""Couplings and fields of a log-density that rewards pairs of coordinates in the same state.

.. math:: \log π(x) = \sum_i h_i(x_i) + \sum_{i < j} J_{ij}\, [x_i = x_j] + \text{const}

A table of a pair is of this kind if it is constant apart from its diagonal, up to what depends on
one of the two alone. The tables are second derivatives in the indicators of the states,

.. math:: T_{ij}(a, b) = \frac{∂^2 \log π}{∂X_{ia} ∂X_{jb}}, \qquad
    J_{ij} = \langle T_{ij}, C \rangle / \langle C, C \rangle

with C the table :math:`[a = b]` without the means of its rows and columns. The coordinates are
coloured so that no two of one colour have a neighbour in common; a derivative along all of a colour
then holds the tables of every one of them.

Reference: sparse Hessians by colours, Gebremedhin, Manne, Pothen, *What color is your Jacobian?*,
SIAM Review 2005.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from scipy.sparse import csr_matrix, triu

from numpyro_ebm.errors import ModelError
from numpyro_ebm.program.coloring import greedy_colors
from numpyro_ebm.program.multi_affine import MultiAffine

__all__ = ["Potts", "read_potts"]

TOLERANCE = 1e-4  # of a table, in units of the largest entry of all
AT_ONCE = 4_000_000  # indicators of points at which derivatives are taken together


class Potts(NamedTuple):
    """Couplings and fields. Made by :func:`read_potts`.

    - **names** - the sites of the coordinates, one after the other.
    - **values** - the values of every coordinate, (coordinates, states).
    - **pairs** - the coordinates that are coupled, integers of shape (pairs, 2).
    - **couplings** - J, of shape (rows, pairs), or (1, pairs) where all rows are alike.
    - **fields** - h, of shape (rows or 1, coordinates, states), -inf at what is no state.
    - **is_binary** - whether all coordinates have two states; then J may be negative.
    - **is_checked** - whether it is known that log π has this form and J these signs. Values that
      are traced are not looked at.
    """

    names: tuple[str, ...]
    values: np.ndarray
    pairs: np.ndarray
    couplings: Any
    fields: Any
    is_binary: bool
    is_checked: bool


def read_potts(form: MultiAffine) -> Potts:
    """Couplings and fields of a log-density of degree two in the indicators of its states.

    :param form: log π of discrete sites, all of whose sites are discrete.
    :return: a :class:`Potts`.
    :raises ModelError: if it has terms of three coordinates, a table of a pair is no multiple of
        :math:`[a = b]`, or J is negative for coordinates of more than two states.

    **Example**

    >>> import jax.numpy as jnp
    >>> from numpyro_ebm.program.multi_affine import multi_affine
    >>> from numpyro_ebm.program.potts import read_potts
    >>> chain = lambda _, x: 0.5 * jnp.sum(x["s"][:, 1:] == x["s"][:, :-1], -1)
    >>> form = multi_affine(chain, {}, {"s": jnp.zeros((1, 3), int)}, {"s": [0, 1, 2]})
    >>> potts = read_potts(form)
    >>> potts.pairs.tolist(), potts.couplings.tolist()
    ([[0, 1], [1, 2]], [[0.5, 0.5]])
    """
    if form.degree > 2:
        raise ModelError(
            f"SwendsenWang: the energy multiplies up to {form.degree} units of {form.names}, and "
            f"clusters grow along pairs. {REMEDY}"
        )
    graph = form.interactions()
    if graph is None:
        graph = csr_matrix(~np.eye(len(form.values), dtype=bool))
    upper = triu(graph, 1).tocoo()
    pairs = np.stack([upper.row, upper.col], 1)
    colors = greedy_colors(csr_matrix(graph + graph @ graph))

    def found():
        tables, *rest = _derivatives(form, colors, pairs)
        return tables, *_couplings_and_fields(form, pairs, tables, *rest)

    if not form.is_known:
        _, couplings, fields = found()
        return Potts(*_states_of(form), pairs, couplings, fields, form.is_binary, False)
    with jax.ensure_compile_time_eval():
        tables, couplings, fields = map(np.asarray, jax.jit(found)())
    potts = Potts(*_states_of(form), pairs, couplings, fields, form.is_binary, True)
    return _checked(form, potts, tables)


def _states_of(form):
    return tuple(form.names), form.values


def _derivatives(form, colors, pairs):
    """Tables of the pairs, second derivatives of every coordinate, and slopes at first states."""
    size, width = form.values.shape
    shape = (size, 1 if form.is_binary else width)
    at_first = np.zeros((form.num_rows, *shape))
    if not form.is_binary:
        at_first[..., 0] = 1.0
    at_first = jnp.asarray(at_first if shape[1] > 1 else at_first[..., 0], float)
    gradient = jax.grad(lambda x: jnp.sum(form({}, x, {})))

    def along(where):
        color, state = where
        moved = (colors == color)[:, None] & (np.arange(shape[1]) == state)
        moved = jnp.broadcast_to(jnp.reshape(moved, at_first.shape[1:]), at_first.shape)
        return jax.jvp(gradient, (at_first,), (moved.astype(at_first.dtype),))[1]

    number = int(colors.max()) + 1
    where = np.indices((number, shape[1])).reshape(2, -1)
    batch_size = max(1, min(AT_ONCE // at_first.size, where.shape[1]))
    found = lax.map(along, tuple(jnp.asarray(where)), batch_size=batch_size)
    found = jnp.reshape(found, (number, shape[1], form.num_rows, *shape))
    first, second = pairs.T
    tables = jnp.moveaxis(found[colors[second], :, :, first], 1, -1)  # (pairs, rows, a, b)
    own = jnp.moveaxis(found[colors, :, :, np.arange(size)], 1, -1)
    slopes = jnp.reshape(gradient(at_first), (form.num_rows, *shape))
    return jnp.moveaxis(tables, 0, 1), jnp.moveaxis(own, 0, 1), slopes


def _couplings_and_fields(form, pairs, tables, own, slopes):
    first, second = pairs.T
    if form.is_binary:  # [x = 1] [y = 1] is half of [x = y], and terms of one coordinate
        couplings = 0.5 * tables[..., 0, 0]
        one = slopes[..., 0] + 0.5 * own[..., 0, 0]
        fields = jnp.stack([jnp.zeros_like(one), one], -1)
    else:
        same, _ = _centred(form, pairs, np.eye(form.values.shape[1]))
        size = np.maximum(np.sum(same**2, (-2, -1)), 1e-30)  # 0 for a site of one value
        couplings = jnp.sum(tables * same, (-2, -1)) / size
        squares = jnp.diagonal(own, axis1=-2, axis2=-1)
        fields = jnp.where(form.is_state, slopes + 0.5 * squares - own[..., 0], -jnp.inf)
    # The slopes are those beside coordinates in their first states, with which the first one pairs.
    paired = jnp.zeros(fields.shape[:2], fields.dtype)
    paired = paired.at[:, first].add(couplings).at[:, second].add(couplings)
    fields = fields.at[..., 0].add(-paired)
    return couplings, fields


def _centred(form, pairs, tables):
    """Tables without the means of their rows and columns, and which entries are of two states."""
    rows, columns = (form.is_state[i].astype(float) for i in pairs.T)
    of_rows, of_columns = (x / np.sum(x, -1, keepdims=True) for x in (rows, columns))
    tables = tables - np.einsum("...ab,...a->...b", tables, of_rows)[..., None, :]
    tables = tables - np.einsum("...ab,...b->...a", tables, of_columns)[..., :, None]
    are_states = rows[:, :, None] * columns[:, None, :]
    return tables * are_states, are_states


def _checked(form, potts, tables):
    """With the pairs that are coupled, if all of them may be."""
    couplings = potts.couplings
    largest = np.max(np.abs(couplings), initial=0.0)
    if not potts.is_binary:
        same, _ = _centred(form, potts.pairs, np.eye(form.values.shape[1]))
        tables, _ = _centred(form, potts.pairs, tables)
        largest = np.max(np.abs(tables), initial=0.0)
        apart = np.abs(tables - couplings[..., None, None] * same).max((0, 2, 3), initial=0.0)
        _refuse(form, potts, apart > TOLERANCE * largest, NOT_EQUALITY)
        _refuse(form, potts, np.any(couplings < -TOLERANCE * largest, 0), NEGATIVE)
    kept = np.any(np.abs(couplings) > 1e-6 * largest, 0)
    return potts._replace(pairs=potts.pairs[kept], couplings=potts.couplings[:, kept])


NOT_EQUALITY = "the energy of {} is no multiple of [equal values], beside terms of one of them"
NEGATIVE = "the energy of {} rewards different values"
REMEDY = (
    "Use `BlockGibbs` or `DiscreteLangevin`, which take any energy; where they mix slowly, lay a "
    "ladder of temperatures under them, `ReplicaExchange(model, kernel=BlockGibbs)`."
)


def _refuse(form, potts, wrong, why):
    if not np.any(wrong):
        return
    pair = potts.pairs[int(np.argmax(wrong))]
    units = " and ".join(form.name_of(i) for i in pair)
    raise ModelError(
        f"SwendsenWang: {why.format(units)}, and clusters grow where equal values are likely. "
        f"{REMEDY}"
    )
