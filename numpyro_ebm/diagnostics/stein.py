# SPDX-License-Identifier: Apache-2.0
r"""Goodness of fit of an unnormalised model, by the kernelised Stein discrepancy.

.. math:: \widehat{\mathrm{KSD}} = \frac{1}{n(n-1)} \sum_{i \ne j} κ(v_i, v_j), \qquad
    κ(v, v') = k\,s·s' + s·∇_{v'} k + s'·∇_v k + \operatorname{tr} ∇_v ∇_{v'} k

with s = ∇_v log p̃ the score of the model: log Z is not needed, and no draws of the model. If the
rows are draws of the model, κ has mean zero in each argument, and the wild bootstrap

.. math:: B = \frac{1}{n(n-1)} \sum_{i \ne j} ε_i ε_j\, κ(v_i, v_j), \qquad ε_i = ±1

has the law of the statistic as n grows; the p-value is the share of such B above it.

With latent sites the score is a mean of :math:`∇_v \log\tilde p(v, h)` over draws of h given v,
made for each row by itself. Two rows then have independent draws, so that κ keeps its mean, and
(v, h) takes the place of v in the test.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import stop_gradient

from numpyro_ebm._compat import not_jax_tracer
from numpyro_ebm.diagnostics.reading import map_leading, pick_marginal, read_rows
from numpyro_ebm.errors import ModelError, check_integer
from numpyro_ebm.marginals import VaGES
from numpyro_ebm.marginals.base import Marginal
from numpyro_ebm.model.row_analysis import check_rows_alike
from numpyro_ebm.objectives.stein import KERNELS
from numpyro_ebm.printed import brief
from numpyro_ebm.program.compilation import run_compiled
from numpyro_ebm.program.progress import Progress
from numpyro_ebm.signatures import explaining
from numpyro_ebm.types import Model, Params

__all__ = ["SteinTest", "stein_test"]


class SteinTest(NamedTuple):
    """What :func:`stein_test` found.

    - **statistic** - the squared discrepancy, a U-statistic: without bias, and so it may be
      negative where the model is right.
    - **p_value** - share of bootstrap draws at or above it, itself counted among them.
    - **null** - the bootstrap draws, (num_bootstrap,).
    - **by_row** - mean of κ of every row with all others, (rows,); their mean is the statistic.
      Rows with large values are where model and data disagree.
    - **bandwidth** - ℓ of the kernel.
    """

    statistic: jax.Array
    p_value: jax.Array
    null: jax.Array
    by_row: jax.Array
    bandwidth: jax.Array

    __repr__ = brief


@explaining
def stein_test(
    rng_key: jax.Array,
    model: Model,
    data: Any,
    *args: Any,
    kernel: Literal["imq", "rbf"] = "imq",
    bandwidth: float | Literal["median"] = "median",
    num_bootstrap: int = 1_000,
    flip_probability: float = 0.5,
    marginal: Marginal | None = None,
    guide: Model | None = None,
    guide_params: Params | None = None,
    draws: Any = None,
    progress_bar: bool = False,
    **kwargs: Any,
) -> SteinTest:
    r"""Test whether rows are draws of a fixed energy-based model.

    :param rng_key: random key.
    :param model: a model with fixed parameters, ``fixed(model, params)``.
    :param data: rows, the model's first argument: an array, or a dict of them, rows leading.
    :param args: further arguments of the model.
    :param str kernel: ``"imq"``, :math:`(1 + \|v - v'\|^2/ℓ^2)^{-1/2}`, or ``"rbf"``,
        :math:`\exp(-\|v - v'\|^2 / 2ℓ^2)`.
    :param bandwidth: ℓ, in the units of v, or ``"median"``, the median distance between rows.
    :param int num_bootstrap: draws of the wild bootstrap; the smallest p-value is
        1/(num_bootstrap + 1).
    :param float flip_probability: how often the sign ε changes from one row to the next: 0.5, where
        they are independent, for independent rows; less for rows in the order of a Markov chain,
        about the inverse of its autocorrelation time.
    :param marginal: how latent sites are integrated out: exactly by default, where that is
        possible; ``VaGES(num_particles)`` takes VaES with a guide.
    :param guide: a guide q(h | v), which is used if it is given, with ten particles unless
        ``marginal`` says otherwise. Its own error counts as the model's: see
        :func:`~numpyro_ebm.posterior_gap`.
    :param dict guide_params: its parameters, such as ``fit.params``.
    :param dict draws: draws of the latent sites given the data, of shape (draws, rows, ...), in
        place of a guide: ``ebm.sample(rng_key, model, 20, data)``. Draws of chains that have
        converged make the test exact as n grows, however many or few there are.
    :param bool progress_bar: show how many rows were compared with all others, from a second on;
        the program is then compiled anew.
    :param kwargs: keyword arguments of the model and the guide.
    :return: :class:`SteinTest` with ``statistic`` and ``p_value``.
    :raises ModelError: if the model has free parameters, discrete visible sites, or an energy that
        reads covariates; if latent sites cannot be summed out and there is neither a guide nor
        draws; if there are fewer than two rows, or a score is not finite.

    It sees what scores see: the shapes of modes, and not the proportions of modes far apart.
    Memory is that of n² numbers. Works under ``jax.jit`` and ``jax.vmap``.

    Reference: Liu, Lee, Jordan, *A kernelized Stein discrepancy for goodness-of-fit tests*, ICML
    2016; Chwialkowski, Strathmann, Gretton, *A kernel test of goodness of fit*, ICML 2016; with
    latents, Kanagawa et al., *A kernel Stein test for comparing latent variable models*, 2019.

    **Example**

    >>> import jax, numpyro
    >>> import numpyro_ebm as ebm
    >>> def gaussian(data, precision):
    ...     with numpyro.plate("data", len(data)):
    ...         v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
    ...         ebm.energy("E", 0.5 * precision * v**2)
    >>> data = jax.random.normal(jax.random.key(0), (300,))
    >>> model = ebm.fixed(gaussian, {})
    >>> [
    ...     float(ebm.stein_test(jax.random.key(1), model, data, t).p_value) > 0.05
    ...     for t in (1.0, 2.0)
    ... ]
    [True, False]
    """
    _check_options(kernel, bandwidth, num_bootstrap, flip_probability)
    row_model = read_rows("stein_test", model, data, args, kwargs)
    _check_sites(row_model)
    key_particles, key_signs = jax.random.split(rng_key)
    if draws is None:
        score = _score(key_particles, row_model, marginal, guide, guide_params)
    else:
        if marginal is not None or guide is not None:
            raise ModelError("stein_test: `draws` take the place of `marginal` and `guide`.")
        score = _score_of_draws(row_model, draws)

    def run():
        point = row_model.unconstrain_visible()
        points, scores = row_model.flatten(point), row_model.flatten(score(point))
        length = _bandwidth(points) if bandwidth == "median" else jnp.asarray(bandwidth, float)
        pairs = _stein_kernel(points, scores, KERNELS[kernel], length, progress.reach)
        rows = len(points)
        by_row = jnp.sum(pairs, 1) / (rows - 1)
        signs = _signs(key_signs, num_bootstrap, rows, flip_probability, pairs.dtype)
        null = jnp.sum((signs @ pairs) * signs, 1) / (rows * (rows - 1))
        statistic = jnp.mean(by_row)
        p_value = (1 + jnp.sum(null >= statistic)) / (num_bootstrap + 1)
        return SteinTest(statistic, p_value, null, by_row, length), scores

    with Progress("Stein kernel", row_model.num_rows, shown=progress_bar) as progress:
        result, scores = run_compiled(run)
    _check_result(row_model, result, scores)
    return result


def _stein_kernel(points, scores, kernel, length, told):
    """κ of all pairs of rows, (rows, rows), zero on the diagonal."""
    value, first, second = kernel
    dimension, scale = points.shape[1], 1.0 / length**2

    def against_all(row):
        i, point, score = row
        gap = point - points
        t = scale * jnp.sum(gap**2, -1)
        pull = -2.0 * scale * first(t) * jnp.sum((score - scores) * gap, -1)
        curvature = -2.0 * scale * (dimension * first(t) + 2.0 * t * second(t))
        kappa = value(t) * (scores @ score) + pull + curvature
        told((i + 1) / len(points))
        return jnp.where(jnp.arange(len(points)) == i, 0.0, kappa)

    return map_leading(against_all, (jnp.arange(len(points)), points, scores))


def _bandwidth(points):
    """Median distance over pairs of different rows."""
    num = len(points)
    distances = map_leading(lambda x: jnp.sqrt(jnp.sum((x - points) ** 2, -1)), points)
    return jnp.median(distances[jnp.triu_indices(num, 1)])


def _signs(rng_key, num_bootstrap, rows, flip_probability, dtype):
    """Signs of the rows, (num_bootstrap, rows): a chain along the rows that starts fairly."""
    key_first, key_flips = jax.random.split(rng_key)
    first = jax.random.rademacher(key_first, (num_bootstrap, 1), dtype)
    flips = jax.random.bernoulli(key_flips, flip_probability, (num_bootstrap, rows - 1))
    later = jnp.cumprod(1 - 2 * flips.astype(dtype), 1)
    return jnp.concatenate([first, first * later], 1)


def _score(rng_key, row_model, marginal, guide, guide_params):
    """The score as the marginal has it."""
    if marginal is None and guide is not None:
        marginal = VaGES(num_particles=10)
    try:
        marginal, guide, params = pick_marginal(
            "stein_test", row_model, marginal, guide, guide_params
        )
    except ModelError as error:
        if marginal is not None:
            raise
        raise ModelError(
            "stein_test: the latent sites cannot be summed out. Pass draws of them, `draws="
            "numpyro_ebm.sample(rng_key, model, 20, data)`, or a `guide` with its `guide_params`. "
            f"({error})"
        ) from None
    point = row_model.unconstrain_visible()
    return marginal.bind(rng_key, row_model, guide, params, point, order=1).score


def _score_of_draws(row_model, draws):
    """The score as a mean over given draws of the latent sites."""
    latent = {}
    if not row_model.latent:
        raise ModelError("stein_test: `draws` are for latent sites, and the model has none.")
    for name, site in row_model.latent.items():
        shape = jnp.shape(site.value)
        if name not in draws or jnp.shape(draws[name])[1:] != shape:
            found = jnp.shape(draws[name]) if name in draws else "nothing"
            raise ModelError(
                f"stein_test: `draws` must have the latent site '{name}' in the shape (draws, "
                f"{str(shape)[1:-1].rstrip(',')}), got {found}. Draw it given these rows: "
                "`numpyro_ebm.sample(rng_key, model, 20, data)`."
            )
        latent[name] = jnp.asarray(draws[name])

    def score(unconstrained):
        def of_draw(h):
            total = lambda u: jnp.sum(row_model.unconstrained_log_density({}, u, h))  # noqa: E731
            return jax.grad(total)(unconstrained)

        return jax.tree.map(lambda x: stop_gradient(jnp.mean(x, 0)), map_leading(of_draw, latent))

    return score


def _check_options(kernel, bandwidth, num_bootstrap, flip_probability):
    if kernel not in KERNELS:
        raise ModelError(f"stein_test: `kernel` must be one of {sorted(KERNELS)}, got {kernel!r}.")
    if bandwidth != "median" and (isinstance(bandwidth, str) or not bandwidth > 0):
        raise ModelError(
            f"stein_test: `bandwidth` must be a positive number or 'median', got {bandwidth!r}."
        )
    check_integer("stein_test", num_bootstrap=num_bootstrap)
    if not 0 < flip_probability <= 0.5:
        raise ModelError(
            "stein_test: `flip_probability` must be above 0 and at most 0.5, got "
            f"{flip_probability}."
        )


def _check_sites(row_model):
    for site in row_model.visible.values():
        if site.is_discrete:
            raise ModelError(
                "stein_test takes derivatives in the visible values, and the visible site "
                f"'{site.name}' is discrete. Compare draws of the model with the data instead, "
                "for instance by `numpyro_ebm.energy_gap`."
            )
    check_rows_alike(
        row_model,
        "stein_test compares rows as draws of one density",
        "Test the rows of each group on their own, or the energies: `numpyro_ebm.energy_gap`.",
    )
    if row_model.num_rows < 2:
        raise ModelError("stein_test compares rows, and there is only one.")


def _check_result(row_model, result, scores):
    if not not_jax_tracer(scores):
        return
    bad = np.flatnonzero(~np.all(np.isfinite(np.asarray(scores)), 1))
    if len(bad):
        raise ModelError(
            f"stein_test: the score is not finite at {len(bad)} of {row_model.num_rows} rows, the "
            f"first of them row {bad[0]}: is the energy finite and smooth there?"
        )
    if not result.bandwidth > 0:
        raise ModelError(
            "stein_test: half of the pairs of rows are equal, so that their median distance is "
            "zero. Pass a `bandwidth`."
        )
