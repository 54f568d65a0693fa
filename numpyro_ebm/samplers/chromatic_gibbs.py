# SPDX-License-Identifier: Apache-2.0
r"""Gibbs sampling colour by colour: discrete coordinates that do not interact are drawn at once.

.. math:: x_C' \sim π(x_C \mid x_{-C}) = \prod_{i \in C} π(x_i \mid x_{-C})
    \quad \text{for every colour } C \text{ in turn}

A lattice with interactions of neighbours has two colours, the fields of a checkerboard, so that a
sweep is two steps whatever its size is. Where log π is affine in the indicators of each coordinate
the conditionals of a colour come from one gradient, where it is a polynomial in the values from a
few; otherwise every value of every coordinate is weighed by an evaluation of log π, all those of a
colour side by side. It is the coloured case of
:mod:`numpyro_ebm.samplers.block_gibbs`, which finds the colours and holds the kernel.

Reference: Gonzalez, Low, Gretton, Guestrin, *Parallel Gibbs sampling: from colored fields to thin
junction trees*, AISTATS 2011.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from numpyro_ebm.program.multi_affine import value_table
from numpyro_ebm.samplers.gibbs_blocks import Block
from numpyro_ebm.samplers.indicator_gibbs import conditional_logits
from numpyro_ebm.samplers.positions import flatten_sites
from numpyro_ebm.types import LogDensity, SiteValues

__all__ = ["draw_coloured", "find_interaction"]

MAX_DEGREE = 8  # polynomials up to here are differenced through their gradient
MAX_BATCH = 4_000_000  # coordinates of candidates that are weighed at once


def draw_coloured(
    rng_key: jax.Array,
    position: SiteValues,
    logdensity_fn: LogDensity,
    block: Block,
    *,
    backwards: bool = False,
) -> SiteValues:
    r"""Draw a coloured block, colour after colour.

    .. math:: x_i' \sim π(x_i \mid x_{-i}) \quad \text{for all } i \text{ of a colour at once}

    :param rng_key: random key.
    :param dict position: arrays of shape (rows, ...) by name.
    :param logdensity_fn: maps such a dict to log π of shape (rows,), row by row.
    :param block: a coloured :class:`~numpyro_ebm.samplers.gibbs_blocks.Block`.
    :param bool backwards: the last colour first.
    :return: dict of the new values of the block's sites.

    **Example**

    >>> import jax, jax.numpy as jnp
    >>> from numpyro_ebm.samplers.gibbs_blocks import plan_block
    >>> from numpyro_ebm.samplers.chromatic_gibbs import draw_coloured
    >>> chain = lambda x: jnp.sum(x["s"][:, 1:] * x["s"][:, :-1], -1)
    >>> position = {"s": jnp.zeros((3, 5), int)}
    >>> block = plan_block(chain, position, ["s"], {"s": [0, 1]})
    >>> draw_coloured(jax.random.key(0), position, chain, block)["s"].shape
    (3, 5)
    """
    flat, unflatten = flatten_sites(position, block.names)
    table, is_value = value_table(position, block.values)
    dtype = jnp.result_type(flat.dtype, float)
    values = jnp.asarray(table.T, flat.dtype)[:, None]  # (K, 1, coordinates)
    colors, forbidden = np.asarray(block.colors), jnp.where(is_value.T, 0.0, -jnp.inf)[:, None]
    is_binary = table.shape[1] == 2 and np.all(is_value)
    if is_binary:
        noise = -jax.random.logistic(rng_key, flat.shape, dtype)
    else:
        noise = jax.random.gumbel(rng_key, (table.shape[1], *flat.shape), dtype)

    def choose(logits, values, noise, forbidden):
        """Values of the first axis with the given logits, by the Gumbel-max trick."""
        if is_binary:
            return jnp.where(logits[1] - logits[0] > noise, values[1], values[0])
        chosen = jnp.argmax(logits + noise + forbidden, 0)
        return jnp.take_along_axis(jnp.broadcast_to(values, logits.shape), chosen[None], 0)[0]

    def log_density(x):
        return logdensity_fn({**position, **unflatten(x)})

    if block.form is not None or block.degree <= MAX_DEGREE:

        def draw_color(flat, color):
            moving = jnp.asarray(colors) == color
            if block.form is not None:
                logits = conditional_logits(block.form, {**position, **unflatten(flat)})
                own = block.form.coordinates(block.names)
                logits = jnp.moveaxis(logits[:, own, : len(values)], -1, 0)
            else:
                logits = _polynomial_logits(log_density, flat.astype(dtype), moving, table, block)
            return jnp.where(moving, choose(logits, values, noise, forbidden), flat), None

        return unflatten(lax.scan(draw_color, flat, np.unique(colors), reverse=backwards)[0])

    members = [np.flatnonzero(colors == color) for color in np.unique(colors)]
    largest = max(map(len, members))
    # Smaller colours are padded with an index out of bounds, which is dropped.
    members = np.stack(
        [np.pad(x, (0, largest - len(x)), constant_values=len(colors)) for x in members]
    )
    batch_size = max(1, MAX_BATCH // flat.size)

    def draw_members(flat, at):
        def logit(change):
            i, value = change
            return log_density(flat.at[:, i].set(value, mode="drop"))

        candidates = values[:, 0, at]  # (K, members)
        changes = jnp.broadcast_to(at, candidates.shape).ravel(), candidates.ravel()
        logits = lax.map(logit, changes, batch_size=batch_size)  # (K members, rows)
        logits = jnp.swapaxes(logits.reshape(*candidates.shape, len(flat)), 1, 2)
        chosen = choose(logits, values[..., at], noise[..., at], forbidden[..., at])
        return flat.at[:, at].set(chosen, mode="drop"), None

    return unflatten(lax.scan(draw_members, flat, members, reverse=backwards)[0])


def find_interaction(
    rng_key: jax.Array,
    logdensity_fn: LogDensity,
    position: SiteValues,
    block: Block,
    num_states: int = 20,
) -> tuple[int, int] | None:
    r"""Try to refute the colours of a block: two coordinates of one colour that interact.

    .. math:: Δ_A Δ_B \log π(x) \ne 0 \quad \text{for random halves } A, B \text{ of a colour}

    :param rng_key: random key.
    :param logdensity_fn: maps a dict of arrays of shape (rows, ...) to log π of shape (rows,).
    :param dict position: values of all sites, of shape (rows, ...).
    :param Block block: a coloured block.
    :param int num_states: random states of the block's sites to try, for each colour and row. A
        pair is met by one state in two; its interaction has to stand out of the rounding of log π.
    :return: two coordinates of the flattened block, or ``None``. It is not to be called under
        ``jax.jit``.

    **Example**

    >>> import jax, jax.numpy as jnp
    >>> from numpyro_ebm.samplers.gibbs_blocks import plan_block
    >>> from numpyro_ebm.samplers.chromatic_gibbs import find_interaction
    >>> chain = lambda x: jnp.sum(x["s"][:, 1:] * x["s"][:, :-1], -1)
    >>> position = {"s": jnp.zeros((3, 5), int)}
    >>> block = plan_block(chain, position, ["s"], {"s": [0, 1]})
    >>> find_interaction(jax.random.key(0), chain, position, block)
    >>> block = block._replace(colors=jnp.array([0, 1, 1, 0, 1]))
    >>> find_interaction(jax.random.key(0), chain, position, block)
    (1, 2)
    """
    flat, unflatten = flatten_sites(position, block.names)
    table, is_value = value_table(position, block.values)
    sizes = jnp.asarray(is_value.sum(1))
    colors = jnp.asarray(block.colors)
    columns, dtype = jnp.arange(flat.shape[1]), jnp.result_type(flat.dtype, float)

    def log_density(index):
        values = jnp.asarray(table)[columns, index].astype(flat.dtype)
        return jnp.asarray(logdensity_fn({**position, **unflatten(values)}), dtype)

    @jax.jit
    def states(key, color):
        """Two random states that differ in all coordinates, and the two halves of a colour."""
        key_x, key_y, key_half = jax.random.split(key, 3)
        x = jax.random.randint(key_x, flat.shape, 0, sizes)
        y = (x + jax.random.randint(key_y, flat.shape, 1, jnp.maximum(sizes, 2))) % sizes
        half = jax.random.bernoulli(key_half, 0.5, (flat.shape[1],))
        return x, y, (colors == color) & half, (colors == color) & ~half

    @jax.jit
    def interact(x, y, first, second):
        """Rows whose second difference stands out of the rounding of its terms."""
        moves = (first | second, first, second, first & second)  # the last is empty
        both, one, other, none = (log_density(jnp.where(move, y, x)) for move in moves)
        total = abs(both) + abs(one) + abs(other) + abs(none)
        rounding = 64 * jnp.finfo(dtype).eps
        return abs(both - one - other + none) > rounding * (total + 1.0)

    def narrow(row, x, y, first, second):
        """Halve ``first`` down to one coordinate that interacts with ``second``."""
        while (count := int(first.sum())) > 1:
            part = first & (jnp.cumsum(first) <= count // 2)
            if interact(x, y, part, second)[row]:
                first = part
            else:
                x, first = jnp.where(part, y, x), first & ~part
        return x, first

    labels, counts = np.unique(np.asarray(block.colors), return_counts=True)
    labels = [label for label, count in zip(labels, counts, strict=True) if count > 1]
    colors_of_states = jnp.asarray(np.repeat(labels, num_states))
    if not labels:
        return None
    keys = jax.random.split(rng_key, len(colors_of_states))
    found = jax.jit(lambda a: lax.map(lambda x: interact(*states(*x)), a))((keys, colors_of_states))
    if not found.any():
        return None
    state, row = np.argwhere(np.asarray(found))[0]
    x, y, first, second = states(keys[state], colors_of_states[state])
    x, first = narrow(row, x, y, first, second)
    _, second = narrow(row, x, y, second, first)
    pair = int(jnp.argmax(first)), int(jnp.argmax(second))
    return min(pair), max(pair)


def _polynomial_logits(log_density, flat, moving, table, block):
    """Logits (K, rows, coordinates) of the moving coordinates, which do not interact.

    The difference of a polynomial between two values is the integral of its derivative, and
    Gauss-Legendre quadrature with n nodes is exact up to the degree 2 n of the polynomial.
    """
    gradient = jax.grad(lambda x: jnp.sum(log_density(x)))
    nodes, weights = np.polynomial.legendre.leggauss(max(1, int(np.ceil(block.degree / 2))))
    low, gap = table[:, :-1].T, np.diff(table, axis=1).T  # (K - 1, coordinates)
    points = low + (nodes[:, None, None] + 1) / 2 * gap  # (nodes, K - 1, coordinates)
    weights = np.broadcast_to(weights[:, None, None] / 2 * gap, points.shape)

    def term(at):
        point, weight = at
        return weight * gradient(jnp.where(moving, point, flat))

    points, weights = (
        jnp.asarray(x.reshape(-1, x.shape[-1]), flat.dtype) for x in (points, weights)
    )
    if len(points) == 1:
        steps = term((points[0], weights[0]))[None]
    else:
        steps = lax.map(term, (points, weights))
    steps = steps.reshape(len(nodes), -1, *flat.shape).sum(0)
    return jnp.concatenate([jnp.zeros_like(steps[:1]), jnp.cumsum(steps, 0)])
