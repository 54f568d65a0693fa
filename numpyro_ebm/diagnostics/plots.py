# SPDX-License-Identifier: Apache-2.0
"""Plots of energy-based models: each takes matplotlib axes and returns them.

``ebm.plots.density(model, ax=ax)`` draws into ``ax``; without, into a new figure, which is
``.figure`` of what is returned. Matplotlib is imported when a plot is drawn, not before:
``pip install "numpyro-ebm[examples]"`` brings it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import jax
import numpy as np

from numpyro_ebm.diagnostics.energies import EnergyGap
from numpyro_ebm.diagnostics.plot_arrays import (
    as_images,
    image_sheet,
    log_density_on_grid,
    log_trapezoid,
    make_grid,
    paths_of_chains,
)
from numpyro_ebm.errors import ModelError, check_integer, shown
from numpyro_ebm.marginals.base import Marginal
from numpyro_ebm.signatures import explaining
from numpyro_ebm.types import Model, Params

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["chains", "density", "energies", "samples", "training"]

COLOR_MAPS = {"density": "viridis", "energy": "viridis_r"}
"""Colour maps of the plane, bright where the model is."""

SEPARATORS = "white", "black", "steelblue", "sandybrown"
"""Colours of the gaps between images; the first one is taken that a colour map has not."""

CLEARLY_APART = 0.25
"""A distance of colours in the cube of red, green and blue."""


@explaining
def density(
    model: Model,
    *args: Any,
    xlim: tuple[float, float] = (-3.0, 3.0),
    ylim: tuple[float, float] = (-3.0, 3.0),
    num: int = 200,
    kind: Literal["density", "energy"] = "density",
    log_normalizer: Any = None,
    marginal: Marginal | None = None,
    guide: Model | None = None,
    guide_params: Params | None = None,
    rng_key: jax.Array | None = None,
    colorbar: bool = True,
    ax: Axes | None = None,
    **kwargs: Any,
) -> Axes:
    r"""Density or energy of a fixed model with two visible coordinates.

    .. math:: p(v) = e^{-E(v)} / Z

    :param model: a model with fixed parameters, ``fixed(model, params)``, the visible values its
        first argument, of shape (rows, 2).
    :param args: further arguments of the model.
    :param xlim, ylim: the frame, in the units of v. It has to lie within the support.
    :param int num: points of the grid in each direction.
    :param str kind: ``"density"``; or ``"energy"`` for the landscape, in nats above its lowest
        point in the frame.
    :param log_normalizer: log Z, a number or what :func:`~numpyro_ebm.log_normalizer` returned. If
        ``None`` the density is normalised by quadrature over the frame, as if there were nothing
        outside.
    :param marginal: how latent sites are integrated out; exactly by default.
        ``ImportanceBound(num_particles)`` needs a guide.
    :param guide: a guide q(h | v).
    :param dict guide_params: its parameters.
    :param rng_key: key of the guide's particles.
    :param bool colorbar: draw a colour bar.
    :param ax: matplotlib axes.
    :param kwargs: keyword arguments of model and guide.
    :return: the axes.
    :raises ModelError: if the model has free parameters or not two visible coordinates, ``kind`` is
        unknown, or the energy is not a number somewhere in the frame.
    :raises ImportError: if matplotlib is missing.

    **Example**

    >>> import jax.numpy as jnp
    >>> import numpyro_ebm as ebm
    >>> params = {"W": jnp.ones((2, 4)), "b": jnp.zeros(2), "c": jnp.zeros(4), "scale": jnp.ones(2)}
    >>> model = ebm.fixed(ebm.models.grbm, params)
    >>> ax = ebm.plots.density(model, xlim=(-3, 7), ylim=(-3, 7))  # doctest: +SKIP
    """
    if kind not in ("density", "energy"):
        raise ModelError(f"plots.density: `kind` must be 'density' or 'energy', got {kind!r}.")
    grid = make_grid("plots.density", xlim, ylim, num)
    log_p = log_density_on_grid(
        "plots.density", grid, model, args, kwargs, marginal, guide, guide_params, rng_key
    )
    if kind == "energy":
        shown, label = np.max(log_p) - log_p, "nats above the lowest"
    else:
        log_z = getattr(log_normalizer, "value", log_normalizer)
        label = "density" if log_z is not None else "density in the frame"
        if log_z is None:
            log_z = log_trapezoid(grid, log_p)
        elif np.ndim(log_z):
            raise ModelError("plots.density: `log_normalizer` must be one number.")
        shown = np.exp(log_p - np.asarray(log_z, float))
    ax = _axes(ax)
    colors = COLOR_MAPS[kind]
    image = ax.pcolormesh(*grid, shown, shading="gouraud", rasterized=True, cmap=colors)
    if colorbar:
        ax.figure.colorbar(image, ax=ax, label=label)
    _frame(ax, xlim, ylim)
    return ax


@explaining
def chains(
    draws: Any,
    model: Model | None = None,
    *args: Any,
    site: str | None = None,
    max_chains: int = 5,
    xlim: tuple[float, float] | None = None,
    ylim: tuple[float, float] | None = None,
    num: int = 150,
    marginal: Marginal | None = None,
    guide: Model | None = None,
    guide_params: Params | None = None,
    rng_key: jax.Array | None = None,
    ax: Axes | None = None,
    **kwargs: Any,
) -> Axes:
    """Paths of Markov chains over the energy landscape of a model with two visible coordinates.

    :param draws: an ``MCMC`` that has run, a dict of draws (chains, draws, ...) by site, or the
        array of one site. Every row of a data plate is a chain of its own.
    :param model: a fixed model, as for :func:`density`, for the landscape behind; ``None`` for
        none. Levels are one nat apart up to 10 nats above the lowest point.
    :param args: further arguments of the model.
    :param str site: the site to draw; the one with two coordinates if ``None``.
    :param int max_chains: the most chains that are drawn, the first ones.
    :param xlim, ylim: the frame; around the draws if ``None``.
    :param int num: points of the grid in each direction.
    :param marginal, guide, guide_params, rng_key: as for :func:`density`.
    :param ax: matplotlib axes.
    :param kwargs: keyword arguments of the model.
    :return: the axes.
    :raises ModelError: if the draws do not have two coordinates, or as :func:`density`.
    :raises ImportError: if matplotlib is missing.

    **Example**

    >>> import jax.numpy as jnp
    >>> import numpyro_ebm as ebm
    >>> path = jnp.cumsum(jnp.ones((1, 50, 2)), 1)
    >>> ax = ebm.plots.chains(path)  # doctest: +SKIP
    """
    paths = paths_of_chains(draws, site)
    low, high = paths.min((0, 1)), paths.max((0, 1))
    margin = 0.1 * np.maximum(high - low, 1e-3)
    frame = np.stack([low - margin, high + margin], -1)
    xlim = tuple(frame[0]) if xlim is None else xlim
    ylim = tuple(frame[1]) if ylim is None else ylim
    ax = _axes(ax)
    if model is not None:
        grid = make_grid("plots.chains", xlim, ylim, num)
        log_p = log_density_on_grid(
            "plots.chains", grid, model, args, kwargs, marginal, guide, guide_params, rng_key
        )
        levels = np.arange(11.0)
        above = np.max(log_p) - log_p
        ax.contourf(*grid, above, levels=levels, cmap="Greys_r", alpha=0.6)
        ax.contour(*grid, above, levels=levels, colors="0.5", linewidths=0.4)
    for i, path in enumerate(paths[:max_chains]):
        ax.plot(*path.T, "-", lw=0.6, marker=".", ms=3, alpha=0.8, label=f"chain {i}")
        ax.plot(*path[0], "o", ms=6, mfc="none", color=ax.lines[-1].get_color())
    _frame(ax, xlim, ylim)
    return ax


def energies(gap: EnergyGap, *, bins: int = 50, ax: Axes | None = None) -> Axes:
    """Histograms of the energies of data and of samples.

    :param gap: what :func:`~numpyro_ebm.energy_gap` returned.
    :param int bins: bins over the range of both.
    :param ax: matplotlib axes.
    :return: the axes.
    :raises ImportError: if matplotlib is missing.

    **Example**

    >>> import numpy as np
    >>> import numpyro_ebm as ebm
    >>> gap = ebm.diagnostics.EnergyGap(np.ones(9), np.zeros(9), 1.0, 0.0, 1.0, 0.0)
    >>> ax = ebm.plots.energies(gap)  # doctest: +SKIP
    """
    for name in ("data", "samples"):
        if not hasattr(gap, name):
            raise ModelError(
                "plots.energies draws what `numpyro_ebm.energy_gap` returned, got "
                f"{type(gap).__name__}."
            )
    edges = np.histogram_bin_edges(np.concatenate([gap.data, gap.samples]), bins)
    ax = _axes(ax)
    for name, style in (("data", {}), ("samples", {"histtype": "step", "lw": 1.5})):
        color = "0.7" if name == "data" else "tab:blue"
        ax.hist(getattr(gap, name), list(edges), density=True, label=name, color=color, **style)
    ax.set_ylim(top=1.2 * ax.get_ylim()[1])  # room for the legend
    ax.set(xlabel="energy, nats", ylabel="share per nat")
    ax.set_title(f"KS {gap.statistic:.2f}, p = {gap.p_value:.2g}", fontsize="medium")
    ax.legend(frameon=False, loc="upper center", ncols=2, fontsize="small")
    return ax


def samples(
    draws: Any,
    *,
    shape: tuple[int, ...] | None = None,
    num_columns: int | None = None,
    num: int = 64,
    gap: int = 1,
    cmap: Any = "gray",
    ax: Axes | None = None,
) -> Axes:
    """Samples as images, side by side in a grid.

    :param draws: images (samples, height, width), or rows of pixels (samples, height * width); axes
        of length one after the first are dropped, so that draws of one row per sample serve as they
        are.
    :param tuple shape: (height, width) of an image; square if rows of pixels come without it.
    :param int num_columns: images side by side; as many as make the grid square if ``None``.
    :param int num: the most images that are drawn, the first ones.
    :param int gap: pixels between two images, of a colour that the colour map does not have.
    :param cmap: colour map; all images share one scale.
    :param ax: matplotlib axes.
    :return: the axes.
    :raises ModelError: if the draws are not images of ``shape``.
    :raises ImportError: if matplotlib is missing.

    **Example**

    >>> import numpy as np
    >>> import numpyro_ebm as ebm
    >>> ax = ebm.plots.samples(np.random.default_rng(0).random((16, 8, 8)))  # doctest: +SKIP
    """
    sheet = image_sheet(as_images(draws, shape)[:num], num_columns, gap)
    ax = _axes(ax)
    colors = _with_separator(cmap)
    ax.imshow(np.ma.masked_invalid(sheet), cmap=colors, interpolation="nearest")
    ax.set_axis_off()
    return ax


def training(
    fit: Any, *, window: int | None = None, label: str | None = None, ax: Axes | None = None
) -> Axes:
    """Loss of a fit against its steps, with a running mean.

    :param fit: what ``EnergySVI.run`` (or ``numpyro.infer.SVI.run``) returned, or the losses.
    :param int window: steps of the running mean; a fiftieth of all if ``None``.
    :param str label: label of the running mean.
    :param ax: matplotlib axes.
    :return: the axes.
    :raises ModelError: if there are no losses, or ``window`` is not a positive integer.
    :raises ImportError: if matplotlib is missing.

    **Example**

    >>> import numpy as np
    >>> import numpyro_ebm as ebm
    >>> ax = ebm.plots.training(np.exp(-np.linspace(0, 3, 500)))  # doctest: +SKIP
    """
    losses = np.asarray(getattr(fit, "losses", fit), float)
    if losses.ndim != 1 or not len(losses):
        raise ModelError(
            "plots.training draws a fit, what `EnergySVI.run` returned, or an array of losses; got "
            f"{type(fit).__name__}."
        )
    window = max(1, len(losses) // 50) if window is None else window
    check_integer("plots.training", window=window)
    window = min(window, len(losses))
    total = np.cumsum(np.concatenate([[0.0], losses]))
    mean = (total[window:] - total[:-window]) / window
    steps = np.arange(len(losses)) + 1
    ax = _axes(ax)
    (line,) = ax.plot(steps[window - 1 :], mean, lw=1.5, label=label, zorder=3)
    if window > 1:
        ax.plot(steps, losses, ".", ms=1, color=line.get_color(), alpha=0.25, rasterized=True)
        low, high = np.quantile(losses[len(losses) // 100 :], [0.005, 0.995])
        margin = 0.1 * (high - low)
        if margin > 0:  # single losses are noisy, and a few would set the scale
            ax.set_ylim(min(low, mean.min()) - margin, max(high, np.quantile(mean, 0.99)) + margin)
    ax.set(xlabel="step", ylabel="loss")
    return ax


def _axes(ax):
    """``ax``, or those of a new figure."""
    if ax is not None:
        if not hasattr(ax, "plot"):
            raise ModelError(f"`ax` must be the `Axes` of a figure of matplotlib, got {shown(ax)}.")
        return ax
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            'Plots need matplotlib: `pip install "numpyro-ebm[examples]"`, or `pip install '
            "matplotlib`."
        ) from error
    return plt.subplots(layout="constrained")[1]


def _frame(ax, xlim, ylim):
    ax.set(xlim=xlim, ylim=ylim, aspect="equal", xlabel="$v_1$", ylabel="$v_2$")


def _with_separator(cmap):
    """A colour map in which what is missing has a colour unlike all that it has."""
    import matplotlib.pyplot as plt
    from matplotlib.colors import to_rgb

    found = plt.get_cmap(cmap)
    own = found(np.linspace(0, 1, 64))[:, :3]
    apart = {x: np.linalg.norm(to_rgb(x) - own, axis=-1).min() for x in SEPARATORS}
    clear = [name for name, distance in apart.items() if distance > CLEARLY_APART]
    return found.with_extremes(bad=clear[0] if clear else max(apart, key=lambda x: apart[x]))
