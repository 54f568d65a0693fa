# SPDX-License-Identifier: Apache-2.0
r"""Two-dimensional toy datasets, generated rather than downloaded; and :func:`dequantize`.

Every toy is a pure function ``toy(rng_key, num_samples)`` that draws independent points of the
plane, and an entry of the registry :data:`TOYS`, which also holds its exact log-density (the two
checkerboards, the two Gaussian mixtures, rings and cosine) and its exact entropy (the checkerboards
and cosine) where these are known. No model can reach a larger expected log-likelihood on a toy
than minus its entropy.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial, wraps
from numbers import Integral
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import i0e, logsumexp
from jax.typing import ArrayLike

from numpyro_ebm.errors import ModelError
from numpyro_ebm.signatures import explaining

__all__ = [
    "TOYS",
    "Toy",
    "checkerboard",
    "checkerboard_4x4",
    "cosine",
    "dequantize",
    "eight_gaussians",
    "log_density",
    "moons",
    "pinwheel",
    "rings",
    "swiss_roll",
    "twenty_five_gaussians",
    "two_spirals",
]


@dataclass(frozen=True)
class Toy:
    """What is known about one toy dataset.

    Attributes
    ----------
    sample : callable
        ``sample(rng_key, num_samples)`` returns points of shape (num_samples, 2).
    log_density : callable or None
        ``log_density(x)`` maps points of shape (..., 2) to exact log-densities of shape (...).
    entropy : float or None
        The exact differential entropy in nats, where it has a closed form.

    Examples
    --------
    >>> from numpyro_ebm import datasets
    >>> toy = datasets.TOYS["checkerboard"]
    >>> toy.sample(jax.random.key(0), 3).shape
    (3, 2)
    >>> round(toy.entropy, 4)
    -0.6931
    """

    sample: Callable
    log_density: Callable | None = None
    entropy: float | None = None


_toys: dict[str, Toy] = {}
TOYS: Mapping[str, Toy] = MappingProxyType(_toys)
"""Read-only registry of all toys, a :class:`Toy` by its name."""

_SHARED_SECTIONS = """

Parameters
----------
rng_key : jax.Array
    A PRNG key; the points are a pure function of it.
num_samples : int
    How many points to draw, at least 1 (static under ``jax.jit``).

Returns
-------
jax.Array
    Points of shape (num_samples, 2), of JAX's default float type.

Raises
------
ModelError
    If ``num_samples`` is not a positive integer.

Examples
--------
>>> import jax
>>> from numpyro_ebm import datasets
>>> datasets.{name}(jax.random.key(0), 1000).shape
(1000, 2)
"""


def _toy(*, log_density=None, entropy=None):
    """Register a sampler, make it check ``num_samples`` and complete its docstring."""

    def register(sample):
        @explaining
        @wraps(sample)
        def checked(rng_key, num_samples):
            is_int = isinstance(num_samples, Integral) and not isinstance(num_samples, bool)
            if not is_int or num_samples < 1:
                raise ModelError(
                    "num_samples must be a positive int (and static under jax.jit), after the "
                    f"random key, got {num_samples!r}"
                )
            return sample(rng_key, int(num_samples))

        sections = _SHARED_SECTIONS.format(name=sample.__name__)
        checked.__doc__ = inspect.cleandoc(sample.__doc__ or "") + sections
        exact = None if log_density is None else _on_points(log_density)
        _toys[sample.__name__] = Toy(checked, exact, entropy)
        return checked

    return register


def _on_points(function):
    """Let a log-density check the shape of its points and answer NaN to NaN."""

    def checked(x):
        x = jnp.asarray(x)
        x = x.astype(jnp.promote_types(x.dtype, jnp.result_type(float)))
        if x.shape[-1:] != (2,):
            raise ModelError(f"points must have shape (..., 2), got {x.shape}")
        value = jnp.where(jnp.isnan(x).any(-1), jnp.nan, function(x))
        return value.astype(x.dtype)

    return checked


def log_density(name: str, x: ArrayLike) -> jax.Array:
    r"""Exact log-density :math:`\log p(x)` of a toy, in nats.

    Parameters
    ----------
    name : str
        The toy's name in :data:`TOYS`.
    x : array_like
        Points of shape (..., 2).

    Returns
    -------
    jax.Array
        Log-densities of shape (...); minus infinity outside of the support.

    Raises
    ------
    ModelError
        If there is no toy of that name, its density is unknown, or ``x`` is not of shape (..., 2).

    Examples
    --------
    >>> from numpyro_ebm import datasets
    >>> datasets.log_density("checkerboard", [[0.2, 0.3], [0.2, 0.8]]).tolist()
    [0.6931, -inf]
    """
    known = {key: toy.log_density for key, toy in TOYS.items() if toy.log_density is not None}
    if name not in known:
        raise ModelError(
            f"no exact log-density for {name!r}; known for: {', '.join(sorted(known))}"
        )
    return known[name](x)


@explaining
def dequantize(rng_key: jax.Array, values: ArrayLike, num_levels: int) -> jax.Array:
    r"""Spread whole numbers, such as the grey values of images, over the unit interval.

    .. math:: v = (x + u) / K, \qquad u \sim \mathrm{Uniform}(0, 1)^D

    On a grid a density of continuous values can grow without end, and the grey values 0 and K - 1
    lie on the boundary of the unit interval. With noise as wide as a step neither is so, and a
    density of v bounds the probability of x, its integral over the cell of x:

    .. math:: \log P(x) \ge E_u \log p(v) - D \log K

    Draw anew in every epoch where there are few rows: the noise is learned by heart otherwise.

    Source: uniform dequantisation, Uria, Murray and Larochelle, NeurIPS 2013; the bound, Theis, van
    den Oord and Bethge, ICLR 2016.

    Parameters
    ----------
    rng_key : jax.Array
        A PRNG key.
    values : array_like
        Whole numbers from 0 to ``num_levels`` - 1, of any shape and type; traced ones are not
        looked at.
    num_levels : int
        K, 256 for bytes and 17 for scikit-learn's digits.

    Returns
    -------
    jax.Array
        Numbers inside of (0, 1), of JAX's default float type.

    Raises
    ------
    ModelError
        If ``num_levels`` is not an integer of at least 2, or ``values`` are not whole numbers of
        that range.

    Examples
    --------
    >>> from numpyro_ebm import datasets
    >>> v = datasets.dequantize(jax.random.key(0), jnp.array([0, 255]), 256)
    >>> bool(0 < v[0] < 1 / 256 < 255 / 256 < v[1] < 1)
    True
    """
    if not isinstance(num_levels, Integral) or isinstance(num_levels, bool) or num_levels < 2:
        raise ModelError(f"num_levels must be an int of at least 2, got {num_levels!r}")
    x = jnp.asarray(values, jnp.result_type(float))
    try:
        whole = np.asarray((x == jnp.floor(x)) & (x >= 0) & (x < num_levels))
    except jax.errors.TracerArrayConversionError:
        whole = np.array(True)
    if not whole.all():
        raise ModelError(
            f"values must be whole numbers from 0 to {num_levels - 1}, and "
            f"{np.size(whole) - np.sum(whole)} of {np.size(whole)} are not; numbers of the unit "
            "interval are whole after `jnp.round(x * (num_levels - 1))`"
        )
    edge = num_levels * jnp.finfo(x.dtype).eps  # so that nothing is rounded to 0 or 1
    return (x + jax.random.uniform(rng_key, x.shape, x.dtype, edge, 1 - edge)) / num_levels


def _squares(rng_key, num_samples, low, side, num_columns):
    """Uniform on the cells of a board whose column and row have the same parity.

    Corner plus offset is exact in floating point for the powers of two used here, so that no point
    is rounded onto a neighbouring cell.
    """
    key_column, key_row, key_inside = jax.random.split(rng_key, 3)
    column = jax.random.randint(key_column, (num_samples,), 0, num_columns)
    row = 2 * jax.random.randint(key_row, (num_samples,), 0, num_columns // 2) + column % 2
    corner = low + side * jnp.stack([column, row], -1)
    return corner + side * jax.random.uniform(key_inside, (num_samples, 2))


def _squares_log_density(x, low, side, num_columns):
    cell = jnp.floor(x / side) - low / side
    on_board = ((cell >= 0) & (cell < num_columns)).all(-1)
    area = side**2 * num_columns**2 / 2
    return jnp.where(on_board & (cell.sum(-1) % 2 == 0), -math.log(area), -jnp.inf)


def _mixture(rng_key, num_samples, centres, scale):
    """Equal mixture of isotropic Gaussians with the given centres, shape (components, 2)."""
    key_component, key_noise = jax.random.split(rng_key)
    component = jax.random.randint(key_component, (num_samples,), 0, len(centres))
    noise = jax.random.normal(key_noise, (num_samples, 2))
    return jnp.asarray(centres)[component] + scale * noise


def _mixture_log_density(x, centres, scale):
    squares = (((x[..., None, :] - jnp.asarray(centres, x.dtype)) / scale) ** 2).sum(-1)
    return logsumexp(-squares / 2, axis=-1) - math.log(len(centres) * 2 * math.pi * scale**2)


_UNIT_BOARD = {"low": 0.0, "side": 0.5, "num_columns": 2}
_WIDE_BOARD = {"low": -4.0, "side": 2.0, "num_columns": 4}


@_toy(log_density=partial(_squares_log_density, **_UNIT_BOARD), entropy=-math.log(2))
def checkerboard(rng_key: jax.Array, num_samples: int) -> jax.Array:
    r"""Uniform on two diagonal squares of the unit square, the checkerboard of the VaGES paper.

    .. math:: x = u / 2 + m, \quad u \sim U[0, 1)^2, \quad m \sim U\{(0, 0), (1/2, 1/2)\}

    The density is 2 on both squares, the entropy :math:`-\ln 2`, the best expected log-likelihood
    :math:`\ln 2`.

    Source: Bao et al., Variational (gradient) estimate of the score function in energy-based
    latent variable models, ICML 2021, arXiv:2010.08258.
    """
    return _squares(rng_key, num_samples, **_UNIT_BOARD)


@_toy(log_density=partial(_squares_log_density, **_WIDE_BOARD), entropy=math.log(32))
def checkerboard_4x4(rng_key: jax.Array, num_samples: int) -> jax.Array:
    r"""Uniform on 8 squares of a 4 x 4 board over [-4, 4)^2, the checkerboard of FFJORD.

    .. math:: p(x) = 1/32 \quad
        \text{where } \lfloor x_1/2 \rfloor + \lfloor x_2/2 \rfloor \text{ is even}

    The entropy is :math:`\ln 32`.

    Source: Grathwohl et al., FFJORD, ICLR 2019, arXiv:1810.01367.
    """
    return _squares(rng_key, num_samples, **_WIDE_BOARD)


# The published generators divide by 1.414, not by sqrt(2): it shows in the entropy's fourth digit.
_ANGLES = np.arange(8) * np.pi / 4
_RING_OF_EIGHT = {
    "centres": 4 / 1.414 * np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], -1),
    "scale": 0.5 / 1.414,
}
_GRID_OF_25 = {
    "centres": 2 / 1.414 * np.array([(i, j) for i in range(-2, 3) for j in range(-2, 3)]),
    "scale": 0.2 / 1.414,
}


@_toy(log_density=partial(_mixture_log_density, **_RING_OF_EIGHT))
def eight_gaussians(rng_key: jax.Array, num_samples: int) -> jax.Array:
    r"""Equal mixture of eight Gaussians on a circle.

    .. math:: p(x) = \frac18 \sum_{k=0}^{7} N(x; r (\cos k\pi/4, \sin k\pi/4), s^2 I),
        \quad r = 4/1.414, \quad s = 0.5/1.414

    Neighbours are 6.1 s apart and overlap slightly, so the entropy has no closed form: it is
    2.83188 by quadrature (error below 1e-5); eight components without overlap would have 2.8382.

    Source: Grathwohl et al., FFJORD, ICLR 2019, arXiv:1810.01367.
    """
    return _mixture(rng_key, num_samples, **_RING_OF_EIGHT)


@_toy(log_density=partial(_mixture_log_density, **_GRID_OF_25))
def twenty_five_gaussians(rng_key: jax.Array, num_samples: int) -> jax.Array:
    r"""Equal mixture of 25 Gaussians on a square grid.

    .. math:: p(x) = \frac1{25} \sum_{i,j=-2}^{2} N(x; d (i, j), s^2 I),
        \quad d = 2/1.414, \quad s = 0.2/1.414

    Neighbours are 10 s apart: the entropy is 2.14503 by quadrature (error below 1e-5), only 3e-6
    less than the closed form of 25 components without overlap. A spacing of 5 s would give 2.0900.

    Source: s as in Schroeder et al., Energy discrepancies, NeurIPS 2023, arXiv:2307.06431; the
    centres before the division as in Gulrajani et al., Improved training of Wasserstein GANs,
    NeurIPS 2017, arXiv:1704.00028 (who divide by 2.828 and have a smaller s).
    """
    return _mixture(rng_key, num_samples, **_GRID_OF_25)


_RADII = np.array([0.75, 1.5, 2.25, 3.0])
_RING_NOISE = 0.08


def _rings_log_density(x):
    square = (x**2).sum(-1, keepdims=True)
    radius = jnp.sqrt(jnp.where(square > 0, square, jnp.finfo(x.dtype).tiny))  # gradient 0 at 0
    radii = jnp.asarray(_RADII, x.dtype)
    variance = _RING_NOISE**2
    terms = jnp.log(i0e(radius * radii / variance)) - (radius - radii) ** 2 / (2 * variance)
    return logsumexp(terms, axis=-1) - math.log(len(_RADII) * 2 * math.pi * variance)


@_toy(log_density=_rings_log_density)
def rings(rng_key: jax.Array, num_samples: int) -> jax.Array:
    r"""Four concentric circles with Gaussian noise in the plane.

    .. math:: x = r (\cos t, \sin t) + s\,\epsilon, \quad r \sim U\{0.75, 1.5, 2.25, 3\},
        \quad t \sim U[0, 2\pi), \quad \epsilon \sim N(0, I), \quad s = 0.08

    The angle integrates to a Bessel function, with :math:`\rho = \|x\|`:

    .. math:: p(x) = \frac14 \sum_r \frac1{2\pi s^2} e^{-(\rho^2 + r^2)/2s^2} I_0(\rho r / s^2)

    Source: the code of Chen et al., Residual flows, NeurIPS 2019, arXiv:1906.02735.
    """
    key_radius, key_angle, key_noise = jax.random.split(rng_key, 3)
    radius = jax.random.choice(key_radius, jnp.asarray(_RADII), (num_samples, 1))
    angle = jax.random.uniform(key_angle, (num_samples,), maxval=2 * math.pi)
    circle = jnp.stack([jnp.cos(angle), jnp.sin(angle)], -1)
    return radius * circle + _RING_NOISE * jax.random.normal(key_noise, (num_samples, 2))


_WAVE_HALF_WIDTH = 2.5
_WAVE_NOISE = 0.1


def _cosine_log_density(x):
    residual = (x[..., 1] - 2.5 * jnp.sin(x[..., 0])) / _WAVE_NOISE
    log_volume = math.log(2 * _WAVE_HALF_WIDTH) + math.log(2 * math.pi * _WAVE_NOISE**2) / 2
    inside = jnp.abs(x[..., 0]) <= _WAVE_HALF_WIDTH
    return jnp.where(inside, -(residual**2) / 2 - log_volume, -jnp.inf)


@_toy(
    log_density=_cosine_log_density,
    entropy=math.log(2 * _WAVE_HALF_WIDTH) + math.log(2 * math.pi * math.e * _WAVE_NOISE**2) / 2,
)
def cosine(rng_key: jax.Array, num_samples: int) -> jax.Array:
    r"""Wave with Gaussian noise across it.

    .. math:: x_1 \sim U[-2.5, 2.5), \quad x_2 \mid x_1 \sim N(2.5 \sin x_1, 0.1^2)

    The name and the sine are the source's. There x_2 is free of noise, and the points have no
    density in the plane; here the entropy is :math:`\ln 5 + \frac12 \ln(2\pi e\, 0.1^2)`.

    Source: the "cos" in the code of Grathwohl et al., FFJORD, ICLR 2019, arXiv:1810.01367.
    """
    key_first, key_noise = jax.random.split(rng_key)
    first = _WAVE_HALF_WIDTH * jax.random.uniform(key_first, (num_samples,), minval=-1.0)
    noise = _WAVE_NOISE * jax.random.normal(key_noise, (num_samples,))
    return jnp.stack([first, 2.5 * jnp.sin(first) + noise], -1)


@_toy()
def moons(rng_key: jax.Array, num_samples: int) -> jax.Array:
    r"""Two interleaved half circles with Gaussian noise.

    .. math:: x = 2 y + 0.2\,\epsilon - (1, 0.2), \quad
        y \in \{(\cos t, \sin t),\ (1 - \cos t, \tfrac12 - \sin t)\}, \quad t \sim U[0, \pi)

    with :math:`\epsilon \sim N(0, I)`; both moons are equally likely.

    Source: Pedregosa et al., scikit-learn, JMLR 2011 (``make_moons``), as scaled by
    FFJORD, arXiv:1810.01367.
    """
    key_moon, key_angle, key_noise = jax.random.split(rng_key, 3)
    lower = jax.random.bernoulli(key_moon, shape=(num_samples, 1))
    angle = jax.random.uniform(key_angle, (num_samples,), maxval=math.pi)
    arc = jnp.stack([jnp.cos(angle), jnp.sin(angle)], -1)
    arc = jnp.where(lower, jnp.array([1.0, 0.5]) - arc, arc)
    noise = 0.2 * jax.random.normal(key_noise, (num_samples, 2))
    return 2 * arc + noise - jnp.array([1.0, 0.2])


@_toy()
def pinwheel(rng_key: jax.Array, num_samples: int) -> jax.Array:
    r"""Five Gaussian blades, bent by a rotation that grows with the distance along the blade.

    .. math:: x = 2 R(-2\pi k/5 - e^a/4)\, (a, b), \quad a \sim N(1, 0.3^2),
        \quad b \sim N(0, 0.1^2), \quad k \sim U\{0, \dots, 4\}

    where R(t) turns by the angle t.

    Source: Johnson et al., Composing graphical models with neural networks, NeurIPS 2016,
    arXiv:1603.06277, with the constants of FFJORD, arXiv:1810.01367.
    """
    key_blade, key_noise = jax.random.split(rng_key)
    blade = jax.random.randint(key_blade, (num_samples,), 0, 5)
    along, across = jax.random.normal(key_noise, (2, num_samples))
    along, across = 1 + 0.3 * along, 0.1 * across
    angle = 2 * math.pi * blade / 5 + jnp.exp(along) / 4
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return 2 * jnp.stack([cos * along + sin * across, cos * across - sin * along], -1)


@_toy()
def swiss_roll(rng_key: jax.Array, num_samples: int) -> jax.Array:
    r"""One spiral arm with Gaussian noise, the section of the Swiss roll.

    .. math:: x = \tfrac15 \bigl(t (\cos t, \sin t) + \epsilon\bigr), \quad
        t \sim U[\tfrac32 \pi, \tfrac92 \pi), \quad \epsilon \sim N(0, I)

    Source: Pedregosa et al., scikit-learn, JMLR 2011 (``make_swiss_roll``), as scaled
    by FFJORD, arXiv:1810.01367.
    """
    key_angle, key_noise = jax.random.split(rng_key)
    angle = 1.5 * math.pi * (1 + 2 * jax.random.uniform(key_angle, (num_samples, 1)))
    arm = angle * jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], -1)
    return (arm + jax.random.normal(key_noise, (num_samples, 2))) / 5


@_toy()
def two_spirals(rng_key: jax.Array, num_samples: int) -> jax.Array:
    r"""Two spiral arms, each the other's mirror image in the origin.

    .. math:: x = \pm \tfrac13 \bigl(t (-\cos t, \sin t) + u/2\bigr) + 0.1\,\epsilon, \quad
        t = 3\pi \sqrt{w}, \quad w \sim U[0, 1), \quad u \sim U[0, 1)^2, \quad \epsilon \sim N(0, I)

    Source: Grathwohl et al., FFJORD, ICLR 2019, arXiv:1810.01367.
    """
    key_sign, key_angle, key_jitter, key_noise = jax.random.split(rng_key, 4)
    sign = jax.random.rademacher(key_sign, (num_samples, 1))
    angle = 3 * math.pi * jnp.sqrt(jax.random.uniform(key_angle, (num_samples, 1)))
    arm = angle * jnp.concatenate([-jnp.cos(angle), jnp.sin(angle)], -1)
    jitter = jax.random.uniform(key_jitter, (num_samples, 2)) / 2
    return sign * (arm + jitter) / 3 + 0.1 * jax.random.normal(key_noise, (num_samples, 2))
