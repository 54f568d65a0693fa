# SPDX-License-Identifier: Apache-2.0
"""Energies of discrete sites, written in many ways: log p̃ of rows from parameters and values."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

D, Q, N = 4, 3, 6  # sites, states, rows
RNG = np.random.default_rng(5)
PAIRS = np.array([(i, j) for i in range(D) for j in range(i + 1, D)])
UP = np.triu_indices(D, 1)
NODES = 4
DYADS = np.triu_indices(NODES, 1)


def normal(*shape):
    return RNG.normal(size=shape)


class Energy(NamedTuple):
    """- **fn** - ``(params, x) -> (rows,)``, with x of shape (rows, D).
    - **params** - at which it is evaluated.
    - **values** - those of one coordinate.
    - **size** - coordinates of a row.
    - **degree** - a bound of the degree in the indicators.
    """

    fn: Callable
    params: dict
    values: tuple = tuple(range(Q))
    size: int = D
    degree: float = 2


def one_hot(x, q=Q):
    return jax.nn.one_hot(x, q)


def spins(x):
    return 2.0 * x - 1.0


def symmetric(J):
    """Couplings of pairs as a matrix with zeros on the diagonal."""
    full = jnp.zeros((D, D)).at[UP].set(J)
    return full + full.T


def blocks(J):
    """Couplings of pairs of states as a matrix of (sites * states)²."""
    full = jnp.zeros((D, D, Q, Q)).at[UP].set(J)
    return full.transpose(0, 2, 1, 3).reshape(D * Q, D * Q)


def adjacency(y):
    A = jnp.zeros((*y.shape[:-1], NODES, NODES), y.dtype).at[..., DYADS[0], DYADS[1]].set(y)
    return A + jnp.swapaxes(A, -1, -2)


def carried(p, x):
    """A chain, by a loop over its sites."""

    def step(total, at):
        left, right, J = at
        return total + J[left, right], None

    total, _ = jax.lax.scan(step, jnp.zeros(len(x)), (x[:, :-1].T, x[:, 1:].T, p["J"]))
    return total


def discounted(x, reverse):
    """Sites weighed by where they stand."""
    step = lambda total, at: (0.5 * total + at, None)  # noqa: E731
    return jax.lax.scan(step, jnp.zeros(len(x)), 1.0 * x.T, reverse=reverse)[0]


def gathered(p, x):
    """A map over the sites that is scanned."""
    fields = jax.lax.map(lambda at: at[0][at[1]], (p["h"], x.T))
    return jnp.sum(fields, 0)


LADDER = np.array([[0.0, 1.0, 2.0], [3.0, 5.0, 8.0], [13.0, 21.0, 34.0]])  # not symmetric
FIELDS = {"h": normal(D, Q)}
POTTS = {"h": normal(D, Q), "J": normal(len(PAIRS), Q, Q)}
ISING = {"h": normal(D), "J": normal(len(PAIRS))}
SQUARE = {"J": normal(D, D)}
BITS, SIGNS = (0, 1), (-1, 1)
CHAIN = {"J": normal(D - 1, Q, Q)}

TAKEN = {
    "fields by one-hot": Energy(
        lambda p, x: jnp.sum(one_hot(x) * p["h"], (1, 2)), FIELDS, degree=1
    ),
    "fields by dot": Energy(lambda p, x: one_hot(x).reshape(len(x), -1) @ p["h"].ravel(), FIELDS),
    "fields by lookup": Energy(
        lambda p, x: jnp.sum(p["h"][jnp.arange(D), x], -1), FIELDS, degree=1
    ),
    "fields by take_along_axis": Energy(
        lambda p, x: jnp.sum(
            jnp.take_along_axis(jnp.broadcast_to(p["h"], (len(x), D, Q)), x[..., None], -1), (1, 2)
        ),
        FIELDS,
    ),
    "fields by comparison": Energy(
        lambda p, x: sum(jnp.sum(jnp.where(x == k, p["h"][:, k], 0.0), -1) for k in range(Q)),
        FIELDS,
    ),
    "fields by a mapped lookup": Energy(gathered, FIELDS, degree=1),
    "a Categorical": Energy(
        lambda p, x: dist.Categorical(logits=p["h"]).to_event(1).log_prob(x), FIELDS, degree=1
    ),
    "powers of one site": Energy(
        lambda p, x: jnp.sum(p["h"][:, 0] * x**2 - jnp.exp(p["h"][:, 1] * x), -1), FIELDS, degree=1
    ),
    "a network of each site": Energy(
        lambda p, x: jnp.sum(jnp.tanh(one_hot(x) @ p["W"]) @ p["v"], -1),
        {"W": normal(Q, 5), "v": normal(5)},
        degree=1,
    ),
    "relu of each site": Energy(
        lambda p, x: jnp.sum(jax.nn.relu(p["h"][:, 0] * x - 0.5), -1), FIELDS, degree=1
    ),
    "potts as a matrix": Energy(
        lambda p, x: (
            jnp.sum(
                (one_hot(x).reshape(len(x), -1) @ blocks(p["J"])) * one_hot(x).reshape(len(x), -1),
                -1,
            )
            + jnp.sum(one_hot(x) * p["h"], (1, 2))
        ),
        POTTS,
    ),
    "potts by einsum": Energy(
        lambda p, x: jnp.einsum(
            "npa,pab,npb->n", one_hot(x)[:, PAIRS[:, 0]], p["J"], one_hot(x)[:, PAIRS[:, 1]]
        ),
        POTTS,
    ),
    "potts by lookup": Energy(
        lambda p, x: jnp.sum(
            p["J"][jnp.arange(len(PAIRS)), x[:, PAIRS[:, 0]], x[:, PAIRS[:, 1]]], -1
        ),
        POTTS,
    ),
    "potts by codes of pairs": Energy(
        lambda p, x: jnp.sum(
            jnp.take(p["J"][0].ravel(), x[:, PAIRS[:, 0]] * Q + x[:, PAIRS[:, 1]]), -1
        ),
        POTTS,
    ),
    "a table of constants": Energy(
        lambda p, x: p["J"][0, 0, 0] * jnp.sum(jnp.asarray(LADDER)[x[:, :-1], x[:, 1:]], -1), POTTS
    ),
    "a loop from the end": Energy(lambda p, x: p["h"][0, 0] * discounted(x, True), FIELDS),
    "a loop of sums": Energy(lambda p, x: p["h"][0, 0] * discounted(x, False), FIELDS),
    "equal neighbours": Energy(
        lambda p, x: p["J"][0, 0, 0] * jnp.sum(x[:, 1:] == x[:, :-1], -1), POTTS
    ),
    "equal pairs of a matrix": Energy(
        lambda p, x: jnp.sum(p["J"] * (x[:, :, None] == x[:, None, :]), (1, 2)), SQUARE
    ),
    "near neighbours": Energy(
        lambda p, x: -p["J"][0, 0, 0] * jnp.sum(abs(x[:, 1:] - x[:, :-1]) ** 1.5, -1), POTTS
    ),
    "larger of pairs": Energy(
        lambda p, x: p["J"][0, 0, 1] * jnp.sum(jnp.maximum(2 * x[:, 1:] - 1, x[:, :-1]), -1), POTTS
    ),
    "embeddings": Energy(
        lambda p, x: jnp.sum(
            jnp.sum(p["U"][x][:, 1:] * p["U"][x][:, :-1], -1) * jnp.arange(1.0, D), -1
        ),
        {"U": normal(Q, 2)},
    ),
    "a chain by scan": Energy(carried, CHAIN),
    "a chain by vmap": Energy(
        lambda p, x: jax.vmap(lambda a: sum(p["J"][i][a[i], a[i + 1]] for i in range(D - 1)))(x),
        CHAIN,
    ),
    "a switch": Energy(
        lambda p, x: jnp.where(
            x[:, 0] == 1, one_hot(x[:, 1]) @ p["h"][0], one_hot(x[:, 2]) @ p["h"][1]
        ),
        FIELDS,
    ),
    "a choice of sums": Energy(
        lambda p, x: jnp.where(x[:, 0] > 1, jnp.sum(p["h"][1:, 0] * x[:, 1:], -1), 0.0), FIELDS
    ),
    "three sites": Energy(
        lambda p, x: jnp.einsum(
            "nia,nib,nic,abc->n", *(one_hot(x)[:, i : i + 2] for i in range(3)), p["T"]
        ),
        {"T": normal(Q, Q, Q)},
        degree=3,
    ),
    "all sites": Energy(lambda p, x: p["h"][0, 0] * jnp.prod(1.0 + x, -1), FIELDS, degree=4),
    "a padded window": Energy(
        lambda p, x: jnp.sum(
            jax.lax.pad(spins(x), 0.0, [(0, 0, 0), (1, 0, 0)])[:, :-1] * spins(x) * p["h"][:, 0], -1
        ),
        FIELDS,
    ),
    "a ring": Energy(lambda p, x: jnp.sum(x * jnp.roll(x, 1, -1) * p["h"][:, 0], -1), FIELDS),
    "differences squared": Energy(
        lambda p, x: -p["h"][0, 0] * jnp.sum((x[:, 1:] - x[:, :-1]) ** 2, -1), FIELDS
    ),
    "ising by pairs": Energy(
        lambda p, x: (
            (spins(x)[:, PAIRS[:, 0]] * spins(x)[:, PAIRS[:, 1]]) @ p["J"] + spins(x) @ p["h"]
        ),
        ISING,
        BITS,
    ),
    "ising as a matrix": Energy(
        lambda p, x: 0.5 * jnp.sum((spins(x) @ symmetric(p["J"])) * spins(x), -1) + x @ p["h"],
        ISING,
        BITS,
    ),
    "ising by einsum": Energy(
        lambda p, x: jnp.einsum("ni,ij,nj->n", spins(x), symmetric(p["J"]), spins(x)), ISING, BITS
    ),
    "spins": Energy(
        lambda p, x: jnp.einsum("ni,ij,nj->n", 1.0 * x, symmetric(p["J"]), 1.0 * x), ISING, SIGNS
    ),
    "products of all pairs": Energy(
        lambda p, x: jnp.sum(p["J"] * x[:, :, None] * x[:, None, :], (1, 2)), SQUARE, SIGNS
    ),
    "a lattice": Energy(
        lambda p, x: (
            p["h"][0]
            * jnp.sum(
                sum(s * jnp.roll(s, 1, a) for s in [spins(x).reshape(-1, 2, 2)] for a in (1, 2)),
                (1, 2),
            )
        ),
        ISING,
        BITS,
    ),
    "a convolution": Energy(
        lambda p, x: jnp.sum(
            jax.lax.conv_general_dilated(
                spins(x)[:, None], jnp.asarray([[[1.0, 0.0, 1.0]]]) * p["h"][0], (1,), "SAME"
            )[:, 0]
            * spins(x),
            -1,
        ),
        ISING,
        BITS,
    ),
    "a Bernoulli": Energy(
        lambda p, x: dist.Bernoulli(probs=jax.nn.sigmoid(p["h"])).to_event(1).log_prob(x),
        ISING,
        BITS,
        degree=1,
    ),
    "both of a pair": Energy(
        lambda p, x: ((x[:, PAIRS[:, 0]] == 1) & (x[:, PAIRS[:, 1]] == 0)) @ p["J"], ISING, BITS
    ),
    "edges and triangles": Energy(
        lambda p, y: (
            p["e"] * jnp.sum(y, -1)
            + p["t"] * jnp.einsum("...ij,...jk,...ki->...", *[adjacency(y)] * 3) / 6
        ),
        {"e": normal(), "t": normal()},
        BITS,
        len(DYADS[0]),
        3,
    ),
    "triangles by vmap": Energy(
        lambda p, y: p["t"] * jax.vmap(lambda A: jnp.trace(A @ A @ A))(adjacency(y)),
        {"t": normal()},
        BITS,
        len(DYADS[0]),
        3,
    ),
    "two-stars": Energy(
        lambda p, y: (
            p["t"]
            * sum(
                adjacency(y)[:, i, j] * adjacency(y)[:, i, k]
                for i in range(4)
                for j in range(4)
                for k in range(j)
            )
        ),
        {"t": normal()},
        BITS,
        len(DYADS[0]),
    ),
    "constants inside": Energy(
        lambda p, x: (
            jnp.sum((1.0 * x @ np.triu(np.arange(16.0).reshape(4, 4), 1)) * x, -1) * p["h"][0, 0]
        ),
        FIELDS,
    ),
    "floats": Energy(
        lambda p, x: jnp.sum(jnp.asarray(x, float)[:, 1:] * x[:, :-1], -1) * p["h"][0, 0], FIELDS
    ),
}

MEETS_ITSELF = {  # degree two, not affine: exact with the curvature of each site
    "a sum squared": Energy(lambda p, x: p["h"][0, 0] * jnp.sum(1.0 * x, -1) ** 2, FIELDS),
    "a full matrix": Energy(lambda p, x: jnp.sum((1.0 * x @ p["J"]) * x, -1), SQUARE),
    "couplings that are zero so far": Energy(
        lambda p, x: jnp.sum((1.0 * x @ p["J"]) * x, -1), {"J": np.zeros((D, D))}
    ),
}
NOT_TAKEN = {
    "a maximum": Energy(lambda p, x: p["h"][0, 0] * jnp.max(x, -1), FIELDS),
    "a parity": Energy(lambda p, x: p["h"][0, 0] * (jnp.sum(x, -1) % 2), FIELDS),
    "a soft sum": Energy(lambda p, x: jax.nn.softplus(1.0 * x @ p["h"][:, 0]), FIELDS),
    "a count compared": Energy(lambda p, x: p["h"][0, 0] * (jnp.sum(x, -1) == 3), FIELDS),
    "a gradient stopped": Energy(
        lambda p, x: jax.lax.stop_gradient(1.0 * x @ p["h"][:, 0]) * x[:, 0], FIELDS
    ),
    "a cube of a sum": Energy(lambda p, x: jnp.sum(p["h"][:, 0] * x, -1) ** 3, FIELDS),
    "an unknown number of steps": Energy(
        lambda p, x: jax.lax.while_loop(
            lambda c: jnp.any(c[0] > 0),
            lambda c: (c[0] - 1, c[1] + p["h"][0, 0]),
            (x, jnp.zeros(len(x))),
        )[1],
        FIELDS,
    ),
    "a branch": Energy(
        lambda p, x: jax.vmap(
            lambda a: jax.lax.cond(
                a[0] + a[1] + a[2] > 3, lambda: p["h"][0, 0], lambda: p["h"][0, 1]
            )
        )(x),
        FIELDS,
    ),
    "met by parameters of one sign": Energy(
        lambda p, x: jnp.maximum(p["h"][0, 0], 0.0) * jnp.sum(1.0 * x, -1) ** 3, FIELDS
    ),
    "sorted": Energy(lambda p, x: jnp.sort(x, -1) @ p["h"][:, 0], FIELDS),
    "a product rounded": Energy(lambda p, x: p["h"][0, 0] * (jnp.sum(x, -1) // 2), FIELDS),
    "infinite": Energy(lambda p, x: jnp.sum(jnp.where(x == 2, -jnp.inf, p["h"][:, 0]), -1), FIELDS),
    "a ratio of sites": Energy(
        lambda p, x: p["h"][0, 0] * jnp.sum(x, -1) / (1.0 + jnp.sum(x[:, 1:], -1)), FIELDS
    ),
}
