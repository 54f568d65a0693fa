# SPDX-License-Identifier: Apache-2.0
"""The arrays that plots draw: densities on a grid, paths of chains, sheets of images.

Everything here is arithmetic, and knows nothing of matplotlib.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.infer import MCMC

from numpyro_ebm.diagnostics.reading import pick_marginal, read_rows
from numpyro_ebm.errors import ModelError, check_integer
from numpyro_ebm.keys import default_key
from numpyro_ebm.marginals.base import Marginal
from numpyro_ebm.program.compilation import run_compiled
from numpyro_ebm.types import Model, Params

__all__ = [
    "Grid",
    "as_images",
    "image_sheet",
    "log_density_on_grid",
    "log_trapezoid",
    "make_grid",
    "paths_of_chains",
]


class Grid(NamedTuple):
    """Coordinates of a grid in the plane, (num,) each."""

    x: np.ndarray
    y: np.ndarray


def make_grid(who: str, xlim: tuple[float, float], ylim: tuple[float, float], num: int) -> Grid:
    """``num`` points in each direction, over a frame of two ``(low, high)``."""
    for name, limits in (("xlim", xlim), ("ylim", ylim)):
        if len(limits) != 2 or not limits[0] < limits[1]:
            raise ModelError(f"{who}: `{name}` must be (low, high), got {limits}.")
    check_integer(who, 2, num=num)
    return Grid(np.linspace(*xlim, num), np.linspace(*ylim, num))


def log_density_on_grid(
    who: str,
    grid: Grid,
    model: Model,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    marginal: Marginal | None = None,
    guide: Model | None = None,
    guide_params: Params | None = None,
    rng_key: jax.Array | None = None,
) -> np.ndarray:
    """log p̃ at the points of a grid: an array of shape (num, num), y leading.

    :param str who: the function that is named in errors.
    :param model: a fixed model with two visible coordinates.
    :param args, kwargs: its arguments after the data.
    :param marginal, guide, guide_params: how latent sites are integrated out.
    :param rng_key: key of the guide's particles.
    """
    points = np.stack(np.meshgrid(*grid), -1).reshape(-1, 2)
    row_model = read_rows(who, model, jnp.asarray(points, float), args, kwargs)
    shapes = {
        k: jnp.shape(row_model.to_rows({k: s.value})[k])[1:] for k, s in row_model.visible.items()
    }
    if list(shapes.values()) != [(2,)] or any(s.is_discrete for s in row_model.visible.values()):
        raise ModelError(
            f"{who}: draws models with one visible site of two real coordinates, and this one has "
            f"{shapes}."
        )
    marginal, reader, params = pick_marginal(who, row_model, marginal, guide, guide_params)
    if marginal.value is None:
        raise ModelError(
            f"{who}: needs values of log p̃(v), and {type(marginal).__name__} estimates derivatives "
            "only. Use `ImportanceBound(num_particles)` with a guide."
        )
    if marginal.needs_guide and rng_key is None:
        raise ModelError(f"{who}: the particles of {marginal!r} need an `rng_key`.")

    def log_density():
        u = row_model.unconstrain_visible()
        key = default_key() if rng_key is None else rng_key
        estimate = marginal.bind(key, row_model, reader, params, u, order=1)
        _, log_det = row_model.constrain(u)
        return estimate.log_density(params, u) - log_det

    log_p = np.asarray(run_compiled(log_density), float).reshape(len(grid.y), len(grid.x))
    if np.any(np.isnan(log_p)) or np.any(log_p == np.inf) or not np.any(np.isfinite(log_p)):
        at = points[np.argmin(np.isfinite(log_p).ravel())]
        raise ModelError(f"{who}: the energy is not a number at {tuple(at)}. Narrow the frame.")
    return log_p


def log_trapezoid(grid: Grid, log_p: np.ndarray) -> float:
    """log of the integral of exp(log_p) over the grid by the trapezoidal rule."""
    highest = np.max(log_p)
    integral = np.trapezoid(np.trapezoid(np.exp(log_p - highest), grid.x, axis=1), grid.y)
    return highest + np.log(integral)


def paths_of_chains(draws: Any, site: str | None) -> np.ndarray:
    """Draws of one site with two coordinates as (chains, draws, 2), rows as chains.

    :param draws: an ``MCMC``, a dict of draws (chains, draws, ...) by site, or the array of one.
    :param site: its name; the one with two coordinates if ``None``.
    """
    if isinstance(draws, MCMC):
        if draws.last_state is None:
            raise ModelError("plots.chains: this MCMC has not been run.")
        draws = draws.get_samples(group_by_chain=True)
    if isinstance(draws, dict):
        names = [k for k, x in draws.items() if np.ndim(x) >= 3 and np.shape(x)[-1] == 2]
        if site is None and len(names) != 1:
            raise ModelError(
                f"plots.chains: the sites {sorted(draws)} have {len(names)} with two coordinates; "
                "name one, `site=`."
            )
        site = names[0] if site is None else site
        if site not in draws:
            raise ModelError(f"plots.chains: there are no draws of '{site}', only {sorted(draws)}.")
        draws = draws[site]
    x = np.asarray(draws, float)
    if x.ndim < 3 or x.shape[-1] != 2:
        raise ModelError(
            f"plots.chains: draws must have the shape (chains, draws, 2) or (chains, draws, rows, "
            f"2), got {x.shape}."
        )
    x = x.reshape(*x.shape[:2], -1, 2)
    return np.swapaxes(x, 1, 2).reshape(-1, x.shape[1], 2)


def as_images(draws: Any, shape: tuple[int, ...] | None) -> np.ndarray:
    """Draws as (images, height, width), axes of length one after the first dropped.

    :param shape: (height, width); rows of pixels are square images if it is ``None``.
    """
    images = np.asarray(draws, float)
    if images.ndim > 1:
        axes = tuple(i for i in range(1, images.ndim) if images.shape[i] == 1)
        images = np.squeeze(images, axes) if images.ndim - len(axes) > 1 else images
    if images.ndim == 2:
        side = math.isqrt(images.shape[1])
        height, width = (side, side) if shape is None else shape
        if height * width == images.shape[1]:
            images = images.reshape(-1, height, width)
    if images.ndim != 3 or shape is not None and images.shape[1:] != tuple(shape):
        raise ModelError(
            f"plots.samples: draws of shape {np.shape(draws)} are no images"
            f"{'' if shape is None else f' of shape {tuple(shape)}'}. Pass (samples, height, "
            "width), or (samples, height * width) with `shape=(height, width)`."
        )
    return images


def image_sheet(images: np.ndarray, num_columns: int | None, gap: int) -> np.ndarray:
    """Images side by side in one image, NaN between them and where there are none.

    :param num_columns: images side by side; as many as make the sheet square if ``None``.
    :param gap: pixels between two images.
    """
    count, height, width = images.shape
    num_columns = math.ceil(math.sqrt(count)) if num_columns is None else num_columns
    num_rows = math.ceil(count / num_columns)
    sheet = np.full((num_rows * num_columns, height + gap, width + gap), np.nan)
    sheet[:count, :height, :width] = images
    sheet = sheet.reshape(num_rows, num_columns, height + gap, width + gap).swapaxes(1, 2)
    sheet = sheet.reshape(num_rows * (height + gap), -1)
    return sheet[: len(sheet) - gap, : sheet.shape[1] - gap]
