# SPDX-License-Identifier: Apache-2.0
"""Where chains begin: at the data, at a Gaussian fitted to them, or at noise.

Reference: noise, Du, Mordatch, *Implicit generation and modeling with energy-based models*, NeurIPS
2019; Nijkamp et al., *Learning non-convergent non-persistent short-run MCMC toward energy-based
model*, NeurIPS 2019; a fitted Gaussian, Yang, Ji, *JEM++: improved techniques for training JEM*,
ICCV 2021.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax.scipy.stats import norm

from numpyro_ebm.errors import ModelError
from numpyro_ebm.language.distributions import scalar_support
from numpyro_ebm.model.finite_supports import support_values
from numpyro_ebm.model.noise import Noise
from numpyro_ebm.model.row_groups import in_groups, num_groups
from numpyro_ebm.model.row_model import RowModel
from numpyro_ebm.objectives.plan import Problem
from numpyro_ebm.types import Params, SiteValues

__all__ = [
    "OWNER",
    "check_initial",
    "draw_latent",
    "draw_visible",
    "spread_of_rows",
    "visible_log_density",
]

OWNER = "ContrastiveDivergence"


def check_initial(initial: Any, row_model: RowModel, covers: bool) -> None:
    """Raise unless chains of this model can begin so, and everywhere if it ``covers``."""
    if initial == "gaussian":
        discrete = [name for name, site in row_model.visible.items() if site.is_discrete]
        if discrete:
            raise ModelError(
                f"{OWNER}: the visible site(s) {discrete} are discrete and no Gaussian. Begin at "
                '`initial="data"`, `"uniform"` or a distribution.'
            )
    elif initial != "data":
        _noise(initial, row_model, covers=covers)


def draw_visible(
    initial: Any, rng_key: jax.Array, params: Params, problem: Problem, num: int
) -> SiteValues:
    """Visible values where chains begin, unconstrained, ``num`` of them leading.

    :param initial: ``"data"``: the rows of the batch, each as often as it takes; ``"gaussian"``:
        independent Gaussians with the mean and the standard deviation of each unconstrained
        coordinate in the batch (1 where it is constant); ``"uniform"``: the uniform distribution on
        finite or bounded supports; or a noise, as :class:`~numpyro_ebm.model.noise.Noise` reads it.
    :param rng_key: random key.
    :param dict params: parameter values by name.
    :param Problem problem: the batch.
    :param int num: how many.
    """
    row_model = problem.row_model
    rows = row_model.to_rows(problem.unconstrained)
    if initial == "data":
        index = jnp.arange(num) % row_model.num_rows
        return {name: x[index] for name, x in rows.items()}
    if initial == "gaussian":
        mean, std = _fitted(problem)
        flat = mean + std * jax.random.normal(rng_key, (num, len(mean)))
        return row_model.to_rows(row_model.unflatten(flat))
    groups = num_groups(num, row_model.num_rows)
    draws = _noise(initial, row_model).draw(rng_key, params, groups)
    draws = jax.vmap(row_model.to_rows)(draws)
    return {
        name: jnp.reshape(x, (-1, *x.shape[2:]))[:num].astype(rows[name].dtype)
        for name, x in draws.items()
    }


def visible_log_density(
    initial: Any, params: Params, problem: Problem, visible: SiteValues
) -> jax.Array:
    """Log-density of :func:`draw_visible` at unconstrained values, rows leading: (rows,)."""
    row_model = problem.row_model
    if initial == "gaussian":
        mean, std = _fitted(problem)

        def log_density(rows):
            flat = row_model.flatten(row_model.from_rows(rows))
            return jnp.sum(norm.logpdf(flat, mean, std), -1)
    else:
        noise = _noise(initial, row_model, covers=True)

        def log_density(rows):
            return noise.log_density(params, row_model.from_rows(rows))

    return in_groups(log_density, row_model.num_rows, visible)


def draw_latent(
    rng_key: jax.Array, params: Params, problem: Problem, visible: SiteValues
) -> tuple[SiteValues, jax.Array]:
    """Latent values where chains begin, of one plate of rows, and their log-densities, (rows,).

    They come from the guide, or are uniform on finite supports.

    :param dict visible: unconstrained visible values, rows leading.
    :return: unconstrained values, rows leading; their densities are those of the constrained ones.
    """
    row_model, guide = problem.row_model, problem.guide
    constrained, _ = row_model.constrain(row_model.from_rows(visible))
    if guide is not None:
        draws = guide.draw(rng_key, params, constrained, 1)
        values = {name: x[0] for name, x in draws.items()}
        density = guide.log_density(params, constrained, values)
    else:
        keys, values, density = jax.random.split(rng_key, len(row_model.latent)), {}, 0.0
        for key, (name, site) in zip(keys, row_model.latent.items(), strict=True):
            support = support_values(site, f"{OWNER}: `weighted=True` without a guide")
            like = jnp.asarray(site.value)
            index = jax.random.randint(key, like.shape, 0, len(support))
            values[name] = jnp.asarray(support, like.dtype)[index]
            density -= like.size / row_model.num_rows * jnp.log(len(support))
        density = jnp.full(row_model.num_rows, density)
    u = {name: row_model.latent[name].unconstrain_draw(x) for name, x in values.items()}
    return row_model.to_rows(u), density


def spread_of_rows(problem: Problem) -> SiteValues | None:
    """Standard deviations of the coordinates in the batch, rows leading; ``None`` of discrete ones.

    They are those of :func:`draw_visible` at a fitted Gaussian.
    """
    row_model = problem.row_model
    if any(site.is_discrete for site in row_model.visible.values()):
        return None
    _, std = _fitted(problem)
    return row_model.to_rows(
        row_model.unflatten(jnp.broadcast_to(std, (row_model.num_rows, len(std))))
    )


def _fitted(problem):
    """Mean and standard deviation of the coordinates of the batch, (coordinates,) each."""
    row_model = problem.row_model
    flat = row_model.flatten(problem.unconstrained)
    weights = row_model.row_weights
    weights = jnp.ones(len(flat)) if weights is None else weights
    flat, share = jnp.where(weights[:, None] > 0, flat, 0.0), weights / jnp.sum(weights)
    mean = share @ flat
    std = jnp.sqrt(share @ (flat - mean) ** 2)
    return mean, jnp.where(std > 0, std, 1.0)


def _noise(initial, row_model, covers=False):
    if isinstance(initial, str):  # "uniform"
        initial = {name: _uniform(site) for name, site in row_model.visible.items()}
    return Noise(initial, row_model, covers=covers)


def _uniform(site):
    shape, support = site.fn.event_shape, scalar_support(site.fn.support)
    if site.is_discrete:
        values = support_values(site, f'{OWNER}: `initial="uniform"`')
        low, high = int(values[0]), int(values[-1])
        one = dist.DiscreteUniform(low, high)
        known = len(values) == high - low + 1
    else:
        low, high = getattr(support, "lower_bound", None), getattr(support, "upper_bound", None)
        known = low is not None and high is not None and not len(jnp.shape(low + high))
        one = dist.Uniform(low, high) if known else dist.Uniform()
    if not known:
        raise ModelError(
            f'{OWNER}: `initial="uniform"` wants a bounded or finite support without gaps, and the '
            f"site '{site.name}' has {site.fn.support}. Begin at a distribution instead, such as "
            '`initial=dist.Normal(0, 1).expand([d]).to_event(1)`, at `"gaussian"` or at `"data"`.'
        )
    return one.expand(shape).to_event(len(shape))
