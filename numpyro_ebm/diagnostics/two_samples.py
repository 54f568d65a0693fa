# SPDX-License-Identifier: Apache-2.0
r"""Two-sample tests of whether draws of a model and rows of data have one law.

.. math:: \widehat{\mathrm{MMD}}^2 = \frac{1}{n(n-1)} \sum_{i \ne j} k(x_i, x_j)
    + \frac{1}{m(m-1)} \sum_{i \ne j} k(y_i, y_j) - \frac{2}{nm} \sum_{i, j} k(x_i, y_j)

If they have, the pooled rows can be parted in any other way: the p-value is the share of random
partings whose statistic is as large, and exact for any number of independent rows.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from numpyro_ebm.diagnostics.reading import map_leading
from numpyro_ebm.errors import ModelError, check_integer, check_positive
from numpyro_ebm.inputs import numbers_of
from numpyro_ebm.printed import brief
from numpyro_ebm.program.compilation import run_compiled
from numpyro_ebm.signatures import explaining

__all__ = ["TwoSampleTest", "flat_rows", "squared_distances", "two_sample_test"]


class TwoSampleTest(NamedTuple):
    """What :func:`two_sample_test` found.

    - **statistic** - the squared MMD, without bias and so negative at times; or the share of rows
      whose nearest neighbour is of their own sample.
    - **standard_error** - of the statistic, where the laws differ; to first order (MMD), or as of
      independent rows (neighbours). Under one law look at ``null``.
    - **p_value** - share of permutations at or above the statistic, itself counted among them.
    - **null** - the statistics of the permutations, (num_permutations,).
    - **bandwidth** - ℓ of the kernel.
    """

    statistic: jax.Array
    standard_error: jax.Array
    p_value: jax.Array
    null: jax.Array
    bandwidth: jax.Array

    __repr__ = brief


@explaining
def two_sample_test(
    rng_key: jax.Array,
    draws: Any,
    data: Any,
    *,
    statistic: Literal["mmd", "neighbours"] = "mmd",
    bandwidth: float | Literal["median"] = "median",
    num_permutations: int = 1_000,
) -> TwoSampleTest:
    r"""Test whether draws and data have one law.

    :param rng_key: random key of the permutations.
    :param draws: independent draws of the model, (draws, ...).
    :param data: rows that the model has not seen, (rows, ...); as many entries each.
    :param str statistic: ``"mmd"``, with the kernel :math:`\exp(-\|x - y\|^2 / 2ℓ^2)`; or
        ``"neighbours"``, how often a classifier by the nearest neighbour is right.
    :param bandwidth: ℓ, or ``"median"``, the median distance of the pooled rows.
    :param int num_permutations: the smallest p-value is 1/(num_permutations + 1).
    :return: :class:`TwoSampleTest`.
    :raises ModelError: if the rows do not fit together, or there are fewer than two of either.

    Draws of a chain depend on each other, and are then found to be unlike the data too often: thin
    them. Rows that the model was trained on make it look better than it is. Memory is that of
    (draws + rows)² numbers.

    Reference: Gretton et al., *A kernel two-sample test*, JMLR 2012; Lopez-Paz, Oquab, *Revisiting
    classifier two-sample tests*, ICLR 2017.

    **Example**

    >>> import jax
    >>> import numpyro_ebm as ebm
    >>> x, y = jax.random.normal(jax.random.key(0), (2, 100, 3))
    >>> test = ebm.diagnostics.two_sample_test
    >>> [bool(test(jax.random.key(1), x, y + t).p_value < 0.01) for t in (0.0, 1.0)]
    [False, True]
    """
    check_integer("two_sample_test", num_permutations=num_permutations)
    if statistic not in ("mmd", "neighbours"):
        raise ModelError(
            f"two_sample_test: `statistic` must be 'mmd' or 'neighbours', got {statistic!r}."
        )
    if bandwidth != "median":
        check_positive("two_sample_test", bandwidth=bandwidth)
    x, y = flat_rows("two_sample_test", draws=draws, data=data)
    num, total = len(x), len(x) + len(y)

    def run(pooled, rng_key):
        squares = squared_distances(pooled, pooled)
        length = _median_distance(squares) if bandwidth == "median" else jnp.asarray(bandwidth)
        own = jnp.arange(total) < num
        orders = jax.vmap(lambda key: jax.random.permutation(key, total))
        labels = own[orders(jax.random.split(rng_key, num_permutations))]
        labels = jnp.concatenate([own[None], labels]).astype(pooled.dtype)
        if statistic == "mmd":
            kernel = jnp.exp(-0.5 * squares / length**2) * (1 - jnp.eye(total))
            values, error = _mmd(kernel, labels, num), _mmd_error(kernel, num)
        else:
            nearest = jnp.argmin(jnp.where(jnp.eye(total, dtype=bool), jnp.inf, squares), 1)
            values = jnp.mean(labels == labels[:, nearest], 1)
            error = jnp.sqrt(values[0] * (1 - values[0]) / total)
        p_value = (1 + jnp.sum(values[1:] >= values[0])) / (num_permutations + 1)
        return TwoSampleTest(values[0], error, p_value, values[1:], length)

    return run_compiled(run, jnp.concatenate([x, y]), rng_key)


def flat_rows(who: str, **samples: Any) -> list[jax.Array]:
    """Samples as matrices, (rows, entries).

    :raises ModelError: if a sample holds other things than finite numbers, has fewer than two
        rows, or they differ in entries.
    """
    found = []
    for x in numbers_of(who, **samples):
        x = jnp.asarray(x, jnp.result_type(float))
        if x.ndim == 0 or len(x) < 2:
            raise ModelError(f"{who}: a sample needs two rows or more, got shape {x.shape}.")
        found.append(jnp.reshape(x, (len(x), -1)))
    if len({x.shape[1] for x in found}) > 1:
        sizes = ", ".join(str(x.shape[1]) for x in found)
        raise ModelError(f"{who}: the samples have rows of {sizes} entries.")
    return found


def squared_distances(x: jax.Array, y: jax.Array) -> jax.Array:
    """Of all pairs, (rows of x, rows of y), by differences and not by products."""
    return map_leading(lambda row: jnp.sum((row - y) ** 2, -1), x)


def _mmd(kernel, labels, num):
    """Squared MMD for many partings; the kernel is zero on its diagonal."""
    other = kernel.shape[0] - num
    towards = labels @ kernel
    within, across = jnp.sum(towards * labels, 1), jnp.sum(towards * (1 - labels), 1)
    rest = jnp.sum(kernel) - within - 2 * across
    within_mean, rest_mean = within / (num * (num - 1)), rest / (other * (other - 1))
    return within_mean + rest_mean - 2 * across / (num * other)


def _mmd_error(kernel, num):
    """Its standard error, by the projections of the U-statistic on single rows."""
    other = kernel.shape[0] - num
    first = jnp.sum(kernel[:num, :num], 1) / (num - 1) - jnp.mean(kernel[:num, num:], 1)
    second = jnp.sum(kernel[num:, num:], 1) / (other - 1) - jnp.mean(kernel[num:, :num], 1)
    return 2 * jnp.sqrt(jnp.var(first, ddof=1) / num + jnp.var(second, ddof=1) / other)


def _median_distance(squares):
    return jnp.median(jnp.sqrt(squares[jnp.triu_indices(len(squares), 1)]))
