# SPDX-License-Identifier: Apache-2.0
r"""What a classifier such as a joint energy model is worth: accuracy, calibration, unlike rows.

Calibration error is the mean distance of confidence and accuracy,

.. math:: \mathrm{ECE} = \sum_b \frac{1}{n} \Big| \sum_{i \in b} (1[\hat y_i = y_i] - c_i) \Big|

over bins b of the confidence :math:`c = \max_y p(y | v)`. It is above zero by chance alone: labels
drawn from the probabilities themselves say by how much.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_ebm.diagnostics.reading import map_leading
from numpyro_ebm.errors import ModelError, check_integer
from numpyro_ebm.inputs import numbers_of
from numpyro_ebm.printed import brief
from numpyro_ebm.signatures import explaining

__all__ = ["Auroc", "Classification", "auroc", "classification"]

ROUNDING = 1e-5
"""Relative difference below which two calibration errors are one: they count as ties."""


class Classification(NamedTuple):
    """What :func:`classification` found. The ``..._error`` are standard errors.

    - **accuracy, accuracy_error** - share of rows whose most probable class is right.
    - **log_loss, log_loss_error** - mean of -log p(y | v), in nats.
    - **calibration, calibration_error** - ECE, and its error by bootstrapped rows.
    - **calibration_baseline** - the mean ECE of perfectly calibrated labels.
    - **calibration_p_value** - share of such labels with an ECE as large; uniform if the
      probabilities are right.
    - **confidence** - of every row, (rows,).
    """

    accuracy: jax.Array
    accuracy_error: jax.Array
    log_loss: jax.Array
    log_loss_error: jax.Array
    calibration: jax.Array
    calibration_error: jax.Array
    calibration_baseline: jax.Array
    calibration_p_value: jax.Array
    confidence: jax.Array

    __repr__ = brief


class Auroc(NamedTuple):
    """An area under a receiver operating characteristic, with its standard error."""

    value: jax.Array
    standard_error: jax.Array

    __repr__ = brief


@explaining
def classification(
    rng_key: jax.Array,
    logits: Any,
    labels: Any,
    *,
    num_bins: int = 15,
    num_bootstrap: int = 1_000,
) -> Classification:
    r"""Accuracy, log-loss and calibration of class probabilities at rows with labels.

    :param rng_key: random key of the bootstrap and of calibrated labels.
    :param logits: log p(y | v) up to a constant a row, (rows, classes), such as those of
        :func:`~numpyro_ebm.models.jem_logits`.
    :param labels: classes, integers, (rows,).
    :param int num_bins: bins of the confidence, of equal width.
    :param int num_bootstrap: resamples, and draws of calibrated labels.
    :return: :class:`Classification`.
    :raises ModelError: if the shapes do not fit, or a label is no class.

    Reference: Guo, Pleiss, Sun, Weinberger, *On calibration of modern neural networks*, ICML 2017;
    calibrated labels, Bröcker, Smith, *Increasing the reliability of reliability diagrams*, 2007.

    **Example**

    >>> import jax, jax.numpy as jnp
    >>> import numpyro_ebm as ebm
    >>> logits = 2.0 * jax.random.normal(jax.random.key(0), (500, 3))
    >>> labels = jax.random.categorical(jax.random.key(1), logits)
    >>> found = ebm.diagnostics.classification(jax.random.key(2), logits, labels)
    >>> bool(found.calibration_p_value > 0.05)
    True
    """
    check_integer("classification", num_bins=num_bins)
    check_integer("classification", minimum=2, num_bootstrap=num_bootstrap)
    logits, labels = _checked_labels(logits, labels)
    log_probs = jax.nn.log_softmax(logits)
    confidence = jnp.exp(jnp.max(log_probs, -1))
    right = (jnp.argmax(log_probs, -1) == labels).astype(confidence.dtype)
    losses = -jnp.take_along_axis(log_probs, labels[:, None], -1)[:, 0]
    bins = jnp.clip(jnp.ceil(confidence * num_bins).astype(int) - 1, 0, num_bins - 1)
    num = len(labels)

    def ece(gaps, bins):
        return jnp.sum(jnp.abs(jax.ops.segment_sum(gaps, bins, num_bins))) / num

    def resampled(key):
        rows = jax.random.randint(key, (num,), 0, num)
        return ece((right - confidence)[rows], bins[rows])

    def calibrated(key):
        return ece(jax.random.bernoulli(key, confidence) - confidence, bins)

    keys = jax.random.split(rng_key, (2, num_bootstrap))
    found, null = ece(right - confidence, bins), map_leading(calibrated, keys[1])
    return Classification(
        *_mean_and_error(right),
        *_mean_and_error(losses),
        found,
        jnp.std(map_leading(resampled, keys[0]), ddof=1),
        jnp.mean(null),
        (1 + jnp.sum(null >= found * (1 - ROUNDING))) / (num_bootstrap + 1),
        confidence,
    )


def auroc(positive: Any, negative: Any) -> Auroc:
    r"""How well a score tells two sorts of rows apart.

    .. math:: \mathrm{AUROC} = P(s^+ > s^-) + \tfrac12 P(s^+ = s^-)

    :param positive: scores of the rows that should have the larger ones, (rows,): for unlike rows
        of another source those of the data, log p(v) or the confidence.
    :param negative: scores of the others, (rows,).
    :return: :class:`Auroc`: 1 if all are told apart, ½ if none is; its error is that of DeLong.
    :raises ModelError: if there are fewer than two scores of either sort.

    Reference: DeLong, DeLong, Clarke-Pearson, *Comparing the areas under two or more correlated
    receiver operating characteristic curves*, Biometrics 1988.

    **Example**

    >>> import jax.numpy as jnp
    >>> import numpyro_ebm as ebm
    >>> float(ebm.diagnostics.auroc(jnp.array([2.0, 3.0]), jnp.array([1.0, 2.0])).value)
    0.875
    """
    found = numbers_of("auroc", finite=False, positive=positive, negative=negative)
    x, y = map(jnp.ravel, found)
    if min(len(x), len(y)) < 2:
        raise ModelError(f"auroc: two scores of either sort at least, got {len(x)} and {len(y)}.")

    def share_below(scores, others):  # ties count half
        others = jnp.sort(others)
        sides = (jnp.searchsorted(others, scores, side=side) for side in ("left", "right"))
        return sum(sides) / (2 * len(others))

    above, below = share_below(x, y), share_below(y, x)
    variance = jnp.var(above, ddof=1) / len(x) + jnp.var(below, ddof=1) / len(y)
    return Auroc(jnp.mean(above), jnp.sqrt(variance))


def _mean_and_error(x):
    return jnp.mean(x), jnp.std(x, ddof=1) / np.sqrt(len(x))


def _checked_labels(logits, labels):
    logits, labels = numbers_of("classification", finite=False, logits=logits, labels=labels)
    logits = jnp.asarray(logits, jnp.result_type(float))
    is_whole = jnp.issubdtype(labels.dtype, jnp.integer)
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or len(labels) < 2 or not is_whole:
        raise ModelError(
            "classification: `logits` must be (rows, classes) and `labels` integers (rows,), two "
            f"rows or more, got {logits.shape} and {labels.dtype} of {labels.shape}."
        )
    try:
        outside = np.flatnonzero((np.asarray(labels) < 0) | (labels >= logits.shape[1]))
    except jax.errors.TracerArrayConversionError:
        outside = np.array([], int)
    if len(outside):
        raise ModelError(
            f"classification: the label of row {outside[0]} is {labels[outside[0]]}, and there are "
            f"{logits.shape[1]} classes."
        )
    return logits, labels
