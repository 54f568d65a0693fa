# SPDX-License-Identifier: Apache-2.0
"""Whether rows share their normalizer: told by the operations, against rows of equal values.

Each function is evaluated with all rows at one value; where rows then differ, it has to be found.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from numpyro_ebm.program.row_axes import follow_rows
from numpyro_ebm.program.rows import Rows

ROWS, WIDTH, GROUPS = 6, 4, 3
rng = np.random.default_rng(1)
OFFSETS = jnp.asarray(rng.normal(size=ROWS))
GROUP = jnp.array([0, 0, 1, 1, 2, 2])
W = jnp.asarray(rng.normal(size=(WIDTH, 3)))
PAIRS = jnp.asarray(rng.normal(size=2 * ROWS))
SQUARE = jnp.asarray(rng.normal(size=(ROWS, ROWS)))
KEY = jax.random.key(0)

# a: (GROUPS,) parameters, x: (ROWS, WIDTH) argument, t: a scalar.
DIFFERENT = {
    "offset": lambda v, a, x: v.sum(-1) + OFFSETS,
    "argument": lambda v, a, x: jnp.sum(v * x, -1),
    "argument, rows last": lambda v, a, x: jnp.einsum("nd,dn->n", v, x.T),
    "group": lambda v, a, x: a[GROUP] * v[:, 0],
    "group by number": lambda v, a, x: a[jnp.arange(ROWS) // 2] * v[:, 0],
    "repeat": lambda v, a, x: jnp.repeat(a, 2) * v[:, 0],
    "tile": lambda v, a, x: jnp.tile(a, 2) * v[:, 0],
    "concatenate": lambda v, a, x: jnp.concatenate([a, -a]) * v[:, 0],
    "pad": lambda v, a, x: jnp.pad(a, (0, 3)) * v[:, 0],
    "one hot": lambda v, a, x: (jax.nn.one_hot(GROUP, GROUPS) @ a) * v[:, 0],
    "hidden in a reshape": lambda v, a, x: jnp.sum(v[:, :2] * PAIRS.reshape(ROWS, 2), -1),
    "matrix of rows": lambda v, a, x: (SQUARE @ jnp.ones(ROWS)) * v[:, 0],
    "diagonal": lambda v, a, x: jnp.diagonal(SQUARE) * v[:, 0],
    "linspace": lambda v, a, x: jnp.linspace(0, 1, ROWS) * v[:, 0],
    "cumulative": lambda v, a, x: jnp.cumsum(jnp.ones(ROWS)) * v[:, 0],
    "set": lambda v, a, x: jnp.zeros(ROWS).at[2].set(1.0) * v[:, 0],
    "random": lambda v, a, x: jax.random.normal(KEY, (ROWS,)) * v[:, 0],
    "one row after another": lambda v, a, x: lax.map(lambda r: r[0] @ r[1], (v, x)),
    "counted": lambda v, a, x: lax.scan(lambda i, r: (i + 1, i * r.sum()), 0, v)[1],
    "scanned data": lambda v, a, x: lax.scan(lambda c, r: (c, c * r.sum()), 0.5, x)[1] * v[:, 0],
    "where": lambda v, a, x: jnp.where(OFFSETS > 0, v[:, 0], 0.0),
    "of a state": lambda v, a, x: x[jnp.arange(ROWS), jnp.argmax(v, -1)],
    "place by numbers that differ": lambda v, a, x: v[
        jnp.arange(ROWS), jnp.argmax(v * jnp.arange(ROWS)[:, None] + v[:, ::-1], -1)
    ],
    "no value at all": lambda v, a, x: OFFSETS,
    "vmap": lambda v, a, x: jax.vmap(jnp.dot)(v, x),
    "sorted": lambda v, a, x: jnp.sort(OFFSETS) * v[:, 0],
    "branch of a row": lambda v, a, x: lax.map(
        lambda r: lax.cond(r[1] > 0, jnp.sum, jnp.prod, r[0]), (v, OFFSETS)
    ),
    "a kernel for every row": lambda v, a, x: jax.vmap(jnp.convolve)(v, x).max(-1),
    "other columns by number": lambda v, a, x: v[jnp.arange(ROWS), jnp.array([0, 1, 2, 3, 0, 1])],
    "matrix function": lambda v, a, x: jnp.linalg.cholesky(SQUARE @ SQUARE.T)[:, 0] * v[:, 0],
}

ALIKE = {
    "own values": lambda v, a, x: jnp.sum(jnp.tanh(v @ W), -1),
    "all parameters": lambda v, a, x: v[:, 0] * a.sum() + v[:, :3] @ a,
    "mean of an argument": lambda v, a, x: v[:, 0] * x.mean(),
    "mean over the rows": lambda v, a, x: v @ x.mean(0),
    "equal constants": lambda v, a, x: v[:, 0] * jnp.ones(ROWS) + jnp.full((ROWS,), 2.0),
    "a parameter of all": lambda v, a, x: v[:, 0] * jnp.broadcast_to(a[0], (ROWS,)),
    "one of the group": lambda v, a, x: a[1] * v[:, 0],
    "places along a row": lambda v, a, x: v @ jnp.arange(WIDTH),
    "table by state": lambda v, a, x: a[jnp.argmax(v[:, :3], -1)],
    "mask along a row": lambda v, a, x: jnp.where(jnp.arange(WIDTH) > 1, v, 0.0).sum(-1),
    "one row after another": lambda v, a, x: lax.map(lambda r: jnp.sum(jnp.tanh(r @ W)), v),
    "place by the row's number": lambda v, a, x: v[jnp.arange(ROWS), jnp.argmax(v, -1)],
    "scan along a row": lambda v, a, x: lax.scan(lambda c, r: (c + r * a[0], 0), 0 * v[:, 0], v.T)[
        0
    ],
    "gradient": lambda v, a, x: jax.vmap(jax.grad(lambda r: jnp.sum(jnp.tanh(r @ W))))(v).sum(-1),
    "pairs": lambda v, a, x: jnp.einsum("ni,ij,nj->n", v, W @ W.T, v),
    "rows by their numbers": lambda v, a, x: v[jnp.arange(ROWS)] @ jnp.ones(WIDTH) * a[0],
    "one number after another": lambda v, a, x: jax.vmap(lambda i: v[i] @ W[:, 0])(
        jnp.arange(ROWS)
    ),
    "convolution": lambda v, a, x: lax.conv_general_dilated(
        v[:, None], W.T[:, None, :], (1,), "SAME", dimension_numbers=("NCH", "OIH", "NCH")
    ).sum((1, 2)),
    "vmapped convolution": lambda v, a, x: jax.vmap(lambda r: jnp.convolve(r, W[:, 0]))(v).max(-1),
    "convolution by parameters": lambda v, a, x: lax.conv_general_dilated(
        v[:, :, None], a[:, None, None], (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
    ).sum((1, 2)),
    "column set": lambda v, a, x: v.at[:, 1].set(a[0]).sum(-1),
}


def found(fn):
    values = {"a": jnp.ones(GROUPS), "v": jnp.ones((ROWS, WIDTH)), "x": jnp.ones((ROWS, WIDTH))}
    rows = [Rows.data((GROUPS,), "a"), Rows(0), Rows.data((ROWS, WIDTH), "x")]
    (result,) = follow_rows(lambda d: fn(d["v"], d["a"], d["x"]), values, rows)
    return result


def differ(fn):
    own = rng.normal(size=WIDTH)
    v = jnp.broadcast_to(jnp.asarray(own), (ROWS, WIDTH))
    a, x = jnp.asarray(rng.normal(size=GROUPS)), jnp.asarray(rng.normal(size=(ROWS, WIDTH)))
    values = np.asarray(fn(v, a, x))
    return bool(np.ptp(values) > 1e-9)


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_tells_rows_apart_is_found(name):
    assert differ(DIFFERENT[name])
    assert found(DIFFERENT[name]).apart


@pytest.mark.parametrize("name", ALIKE)
def test_rows_that_are_alike_are_known_to_be(name):
    assert not differ(ALIKE[name])
    result = found(ALIKE[name])
    assert result.axis == 0 and not result.apart


def test_what_tells_rows_apart_is_named():
    assert found(lambda v, a, x: v[:, 0] * x[:, 0] + a.sum()).apart == {"x"}
    assert found(lambda v, a, x: a[GROUP] * v[:, 0]).apart == {
        "a",
        "an array of shape (6,) that the model closes over",
    }
