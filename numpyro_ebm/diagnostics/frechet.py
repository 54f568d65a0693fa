# SPDX-License-Identifier: Apache-2.0
r"""Fréchet distance of draws and data in a small space of features.

.. math:: d^2 = \|m_1 - m_2\|^2 + \operatorname{tr}\big(C_1 + C_2
    - 2 (C_1^{1/2} C_2\, C_1^{1/2})^{1/2}\big)

the squared 2-Wasserstein distance of two Gaussians with the means and covariances of the features.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_ebm.diagnostics.plot_arrays import as_images
from numpyro_ebm.diagnostics.two_samples import flat_rows
from numpyro_ebm.errors import ModelError, check_integer
from numpyro_ebm.printed import brief
from numpyro_ebm.program.compilation import run_compiled
from numpyro_ebm.signatures import explaining

__all__ = ["FrechetDistance", "cosine_features", "frechet_distance"]


class FrechetDistance(NamedTuple):
    """What :func:`frechet_distance` found.

    - **value** - the squared distance; too large in finite samples, by about ``baseline``.
    - **standard_error** - of ``value``, from bootstrapped rows of both samples.
    - **baseline** - its mean where the pooled rows are parted at random: what two samples of one
      law have at these sizes.
    """

    value: jax.Array
    standard_error: jax.Array
    baseline: jax.Array

    __repr__ = brief


def cosine_features(
    images: Any, num_frequencies: int = 4, *, shape: tuple[int, int] | None = None
) -> jax.Array:
    r"""The lowest frequencies of images: a fixed linear space of features for digits.

    .. math:: f_{kl} = \sum_{ij} c_{ki} c_{lj} v_{ij}, \qquad
        c_{ki} = \sqrt{\tfrac{2 - δ_{k0}}{n}} \cos\frac{π k (2i + 1)}{2n}

    The two-dimensional cosine transform (DCT-II, orthonormal): nothing is trained, so that numbers
    compare between models, runs and papers.

    :param images: (rows, height, width), or rows of pixels.
    :param int num_frequencies: of each side.
    :param shape: (height, width); square if rows of pixels come without it.
    :return: of shape (rows, num_frequencies²).
    :raises ModelError: if there are no images of this shape, or sides of fewer pixels.

    **Example**

    >>> import jax.numpy as jnp
    >>> import numpyro_ebm as ebm
    >>> float(ebm.diagnostics.cosine_features(jnp.ones((1, 64)))[0, 0])  # 8 times the mean
    8.0
    """
    check_integer("cosine_features", num_frequencies=num_frequencies)
    x = jnp.asarray(as_images(images, shape), jnp.result_type(float))
    if num_frequencies > min(x.shape[1:]):
        raise ModelError(
            f"cosine_features: images of {x.shape[1:]} have no {num_frequencies} frequencies."
        )
    rows, columns = (_cosines(n, num_frequencies) for n in x.shape[1:])
    found = jnp.einsum("nij,ki,lj->nkl", x, rows, columns, precision="highest")
    return jnp.reshape(found, (len(x), -1))


@explaining
def frechet_distance(
    rng_key: jax.Array,
    draws: Any,
    data: Any,
    *,
    features: Callable[[Any], Any] | None = None,
    num_bootstrap: int = 200,
) -> FrechetDistance:
    r"""The Fréchet distance of draws and data.

    :param rng_key: random key of bootstrap and baseline.
    :param draws: draws of the model, (draws, ...).
    :param data: rows, (rows, ...), better such that the model has not seen.
    :param features: a function of either that returns (rows, features), such as
        :func:`cosine_features` for images; the rows themselves if ``None``.
    :param int num_bootstrap: resamples.
    :return: :class:`FrechetDistance`.
    :raises ModelError: if the features do not fit together, or a sample has no more rows than
        there are features.

    It compares means and covariances and nothing else. Only distances in the same features compare;
    look at them beside ``baseline``, and beside the distance of held-out data.

    Reference: Dowson, Landau, *The Fréchet distance between multivariate normal distributions*,
    1982; as a measure of draws, Heusel et al., *GANs trained by a two time-scale update rule*,
    NeurIPS 2017.

    **Example**

    >>> import jax
    >>> import numpyro_ebm as ebm
    >>> x, y = jax.random.normal(jax.random.key(0), (2, 500, 3))
    >>> found = ebm.diagnostics.frechet_distance(jax.random.key(1), x, 2.0 * y)  # truth: 3
    >>> bool(abs(found.value - found.baseline - 3.0) < 4 * found.standard_error)
    True
    """
    check_integer("frechet_distance", minimum=2, num_bootstrap=num_bootstrap)
    if features is not None:
        draws, data = features(draws), features(data)
    x, y = flat_rows("frechet_distance", draws=draws, data=data)
    if min(len(x), len(y)) <= x.shape[1]:
        raise ModelError(
            f"frechet_distance: {len(x)} and {len(y)} rows do not tell the covariance of "
            f"{x.shape[1]} features. Take more rows, or fewer features (`cosine_features`)."
        )
    num = len(x)

    def run(pooled, rng_key):
        def resampled(key):
            keys = jax.random.split(key)
            parts = [
                part[jax.random.randint(k, (len(part),), 0, len(part))]
                for k, part in zip(keys, (pooled[:num], pooled[num:]), strict=True)
            ]
            return _squared_frechet(*parts)

        def parted(key):
            shuffled = jax.random.permutation(key, pooled)
            return _squared_frechet(shuffled[:num], shuffled[num:])

        keys = jax.random.split(rng_key, (2, num_bootstrap))
        # One by one: a run with eigenvalues of batches, in loops side by side, was seen to hang on
        # two cores, all of its threads waiting.
        error = jnp.std(jax.lax.map(resampled, keys[0]), ddof=1)
        baseline = jnp.mean(jax.lax.map(parted, keys[1]))
        return FrechetDistance(_squared_frechet(pooled[:num], pooled[num:]), error, baseline)

    return run_compiled(run, jnp.concatenate([x, y]), rng_key)


def _squared_frechet(x, y):
    cov = partial(jnp.cov, rowvar=False)
    first, second = (jnp.atleast_2d(cov(part)) for part in (x, y))
    root = _square_root(first)
    mixed = jnp.linalg.eigvalsh(root @ second @ root)
    mean = jnp.sum((jnp.mean(x, 0) - jnp.mean(y, 0)) ** 2)
    trace = jnp.trace(first) + jnp.trace(second)
    return mean + trace - 2 * jnp.sum(jnp.sqrt(jnp.maximum(mixed, 0.0)))


def _square_root(matrix):
    values, vectors = jnp.linalg.eigh(matrix)
    return (vectors * jnp.sqrt(jnp.maximum(values, 0.0))) @ vectors.T


def _cosines(size, num):
    """The cosine transform of one side, (num, size), orthonormal rows."""
    k, i = np.arange(num)[:, None], np.arange(size)
    waves = np.sqrt(np.where(k == 0, 1, 2) / size) * np.cos(np.pi * k * (2 * i + 1) / (2 * size))
    return jnp.asarray(waves, jnp.result_type(float))
