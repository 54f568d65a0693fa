# SPDX-License-Identifier: Apache-2.0
"""Plots of energy-based models: each takes matplotlib axes and returns them.

``ebm.plots.density(model, ax=ax)`` draws into ``ax``; without, into a new figure, which is
``.figure`` of what is returned. Matplotlib is imported when a plot is drawn, not before:
``pip install "numpyro-ebm[examples]"`` brings it.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.infer import MCMC

from numpyro_ebm.diagnostics.rows import pick_marginal, read_rows
from numpyro_ebm.errors import ModelError

__all__ = ["chains", "density", "energies", "samples", "training"]


def density(
    model,
    *args,
    xlim=(-3.0, 3.0),
    ylim=(-3.0, 3.0),
    num=200,
    kind="density",
    log_normalizer=None,
    marginal=None,
    guide=None,
    guide_params=None,
    rng_key=None,
    colorbar=True,
    ax=None,
    **kwargs,
):
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
    x, y, log_p = _log_density_on_grid(
        "plots.density",
        model,
        args,
        kwargs,
        (xlim, ylim, num),
        (marginal, guide, guide_params, rng_key),
    )
    if kind == "energy":
        shown, label = np.max(log_p) - log_p, "energy above the lowest, nats"
    else:
        log_z = getattr(log_normalizer, "value", log_normalizer)
        label = "density" if log_z is not None else "density, normalised in the frame"
        if log_z is None:
            log_z = _log_trapezoid(x, y, log_p)
        elif np.ndim(log_z):
            raise ModelError("plots.density: `log_normalizer` must be one number.")
        shown = np.exp(log_p - np.asarray(log_z, float))
    ax = _axes(ax)
    image = ax.pcolormesh(x, y, shown, shading="gouraud", rasterized=True, cmap=_CMAPS[kind])
    if colorbar:
        ax.figure.colorbar(image, ax=ax, label=label)
    _frame(ax, xlim, ylim)
    return ax


def chains(
    draws,
    model=None,
    *args,
    site=None,
    max_chains=5,
    xlim=None,
    ylim=None,
    num=150,
    marginal=None,
    guide=None,
    guide_params=None,
    rng_key=None,
    ax=None,
    **kwargs,
):
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
    paths = _paths(draws, site)
    low, high = paths.min((0, 1)), paths.max((0, 1))
    margin = 0.1 * np.maximum(high - low, 1e-3)
    frame = np.stack([low - margin, high + margin], -1)
    xlim = tuple(frame[0]) if xlim is None else xlim
    ylim = tuple(frame[1]) if ylim is None else ylim
    grid = None
    if model is not None:
        grid = _log_density_on_grid(
            "plots.chains",
            model,
            args,
            kwargs,
            (xlim, ylim, num),
            (marginal, guide, guide_params, rng_key),
        )
    ax = _axes(ax)
    if grid is not None:
        x, y, log_p = grid
        levels = np.arange(11.0)
        above = np.max(log_p) - log_p
        ax.contourf(x, y, above, levels=levels, cmap="Greys_r", alpha=0.6)
        ax.contour(x, y, above, levels=levels, colors="0.5", linewidths=0.4)
    for i, path in enumerate(paths[:max_chains]):
        ax.plot(*path.T, "-", lw=0.6, marker=".", ms=3, alpha=0.8, label=f"chain {i}")
        ax.plot(*path[0], "o", ms=6, mfc="none", color=ax.lines[-1].get_color())
    _frame(ax, xlim, ylim)
    return ax


def energies(gap, *, bins=50, ax=None):
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
        ax.hist(getattr(gap, name), edges, density=True, label=name, color=color, **style)
    ax.set(xlabel="energy, nats", ylabel="share per nat")
    ax.set_title(f"KS {gap.statistic:.2f}, p = {gap.p_value:.2g}", fontsize="medium")
    ax.legend(frameon=False)
    return ax


def samples(draws, *, shape=None, num_columns=None, num=64, gap=1, cmap="gray", ax=None):
    """Samples as images, side by side in a grid.

    :param draws: images (samples, height, width), or rows of pixels (samples, height * width); axes
        of length one after the first are dropped, so that draws of one row per sample serve as they
        are.
    :param tuple shape: (height, width) of an image; square if rows of pixels come without it.
    :param int num_columns: images side by side; as many as make the grid square if ``None``.
    :param int num: the most images that are drawn, the first ones.
    :param int gap: pixels between two images.
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
    images = images[:num]
    count, height, width = images.shape
    num_columns = math.ceil(math.sqrt(count)) if num_columns is None else num_columns
    num_rows = math.ceil(count / num_columns)
    sheet = np.full((num_rows * num_columns, height + gap, width + gap), np.nan)
    sheet[:count, :height, :width] = images
    sheet = sheet.reshape(num_rows, num_columns, height + gap, width + gap).swapaxes(1, 2)
    sheet = sheet.reshape(num_rows * (height + gap), -1)
    sheet = sheet[: len(sheet) - gap, : sheet.shape[1] - gap]
    ax = _axes(ax)
    ax.imshow(sheet, cmap=cmap, interpolation="nearest")
    ax.set_axis_off()
    return ax


def training(fit, *, window=None, label=None, ax=None):
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
    if not isinstance(window, int) or window < 1:
        raise ModelError(f"plots.training: `window` must be a positive integer, got {window!r}.")
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


_CMAPS = {"density": "viridis", "energy": "viridis_r"}


def _axes(ax):
    if ax is not None:
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


def _log_density_on_grid(who, model, args, kwargs, frame, how):
    """log p̃ at the points of a grid: its axes, and an array of shape (num, num), y leading."""
    (xlim, ylim, num), (marginal, guide, guide_params, rng_key) = frame, how
    for name, limits in (("xlim", xlim), ("ylim", ylim)):
        if len(limits) != 2 or not limits[0] < limits[1]:
            raise ModelError(f"{who}: `{name}` must be (low, high), got {limits}.")
    if not isinstance(num, int) or num < 2:
        raise ModelError(f"{who}: `num` must be an integer of at least 2, got {num!r}.")
    x, y = np.linspace(*xlim, num), np.linspace(*ylim, num)
    grid = np.stack(np.meshgrid(x, y), -1).reshape(-1, 2)
    joint = read_rows(who, model, jnp.asarray(grid, float), args, kwargs)
    shapes = {k: jnp.shape(joint.to_rows({k: s.value})[k])[1:] for k, s in joint.visible.items()}
    if list(shapes.values()) != [(2,)] or any(s.is_discrete for s in joint.visible.values()):
        raise ModelError(
            f"{who}: draws models with one visible site of two real coordinates, and this one has "
            f"{shapes}."
        )
    marginal, reader, params = pick_marginal(who, joint, marginal, guide, guide_params)
    if marginal.value is None:
        raise ModelError(
            f"{who}: needs values of log p̃(v), and {type(marginal).__name__} estimates derivatives "
            "only. Use `ImportanceBound(num_particles)` with a guide."
        )
    if marginal.needs_guide and rng_key is None:
        raise ModelError(f"{who}: the particles of {marginal!r} need an `rng_key`.")

    @jax.jit
    def log_density():
        u = joint.unconstrain_visible()
        key = jax.random.key(0) if rng_key is None else rng_key
        estimate = marginal.bind(key, joint, reader, params, u, order=1)
        _, log_det = joint.constrain(u)
        return estimate.log_density(params, u) - log_det

    log_p = np.asarray(log_density(), float).reshape(num, num)
    if np.any(np.isnan(log_p)) or np.any(log_p == np.inf) or not np.any(np.isfinite(log_p)):
        at = grid[np.argmin(np.isfinite(log_p).ravel())]
        raise ModelError(f"{who}: the energy is not a number at {tuple(at)}. Narrow the frame.")
    return x, y, log_p


def _log_trapezoid(x, y, log_p):
    """log of the integral of exp(log_p) over the grid by the trapezoidal rule."""
    highest = np.max(log_p)
    integral = np.trapezoid(np.trapezoid(np.exp(log_p - highest), x, axis=1), y)
    return highest + np.log(integral)


def _paths(draws, site):
    """Draws of one site with two coordinates as (chains, draws, 2), rows as chains."""
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
