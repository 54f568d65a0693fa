# SPDX-License-Identifier: Apache-2.0
r"""How to draw a block of sites from its conditional, read off the log-density.

.. math:: π(x_B \mid x_{-B}) \text{ is Gaussian if } \deg_{x_B} \log π = 2, \quad
    \text{a product of Bernoullis if } \deg_{x_B} \log π ≤ 1

The degree is that of the operations of the log-density, by :mod:`numpyro_ebm.program.polynomial`.
Other discrete coordinates are coloured so that those of one colour do not interact, by
:mod:`numpyro_ebm.program.interactions`; where nothing can be told of their interactions they are
drawn one by one. :mod:`numpyro_ebm.samplers.block_gibbs` draws the blocks.
"""

import warnings
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from numpyro_ebm.errors import ModelError
from numpyro_ebm.program.coloring import greedy_colors
from numpyro_ebm.program.interactions import interactions
from numpyro_ebm.program.multi_affine import MultiAffine
from numpyro_ebm.program.polynomial import structure
from numpyro_ebm.program.tempered_form import Tempered
from numpyro_ebm.samplers.gaussian_conditional import why_not_gaussian
from numpyro_ebm.samplers.positions import flatten_sites
from numpyro_ebm.types import LogDensity, SiteValues

__all__ = ["Block", "advice", "plan_block"]


class Block(NamedTuple):
    """A block of coordinates and how to draw it. Made by :func:`plan_block`.

    - **names** - tuple of the sites it draws.
    - **kind** - ``"gaussian"``, ``"bernoulli"`` (all coordinates at once), ``"coloured"`` (the
      coordinates of a colour at once) or ``"sequential"`` (coordinate by coordinate).
    - **values** - the values of one coordinate of each discrete site, by name.
    - **is_diagonal** - whether a Gaussian's coordinates are independent.
    - **colors** - of a coloured block: the colour of every coordinate, of shape (coordinates,).
    - **degree** - of a coloured block: a bound of the degree of log π in its coordinates.
    - **form** - log π in the indicators of all discrete sites, where it is known; of the density
      that is drawn from, and no other.
    """

    names: tuple[str, ...]
    kind: Literal["gaussian", "bernoulli", "coloured", "sequential"]
    values: Mapping[str, Any]
    is_diagonal: bool = False
    colors: np.ndarray | None = None
    degree: float = np.inf
    form: MultiAffine | Tempered | None = None


def plan_block(
    logdensity_fn: LogDensity,
    position: SiteValues,
    names: Iterable[str],
    values: Mapping[str, ArrayLike],
    colors: Mapping[str, ArrayLike] | None = None,
) -> Block:
    """How to draw some sites from their joint conditional, at any position.

    :param logdensity_fn: maps a dict of arrays of shape (rows, ...) to log π of shape (rows,), row
        by row.
    :param dict position: any position, for its shapes.
    :param names: the sites of the block.
    :param dict values: the possible values of one coordinate, of shape (K,), of the discrete sites.
    :param dict colors: integer arrays of shape (...) by site name: coordinates of equal colour are
        taken for conditionally independent, which ``chromatic_gibbs.find_interaction`` can refute.
        They are found in the operations of the log-density for the sites that are not named.
    :return: a :class:`Block`.
    :raises ModelError: if real sites are not Gaussian given the rest, or real and discrete sites
        are to be drawn together.

    **Example**

    >>> import jax.numpy as jnp
    >>> from numpyro_ebm.samplers.gibbs_blocks import plan_block
    >>> log_density = lambda x: jnp.sum(x["h"] * x["v"] - 0.5 * x["v"] ** 2, -1)
    >>> position = {"v": jnp.zeros((3, 2)), "h": jnp.zeros((3, 2), int)}
    >>> plan_block(log_density, position, ["v"], {"h": [0, 1]}).kind
    'gaussian'
    >>> plan_block(log_density, position, ["h"], {"h": [0, 1]}).kind
    'bernoulli'
    >>> chain = lambda x: jnp.sum(x["s"][:, 1:] * x["s"][:, :-1], -1)
    >>> plan_block(chain, {"s": jnp.zeros((3, 5), int)}, ["s"], {"s": [0, 1]}).colors.tolist()
    [1, 0, 1, 0, 1]
    """
    names = tuple(names)
    discrete = {name: np.asarray(values[name]) for name in names if name in values}
    if discrete and len(discrete) < len(names):
        real = sorted(set(names) - set(discrete))
        raise ModelError(
            f"A block of Gibbs sampling cannot draw the real sites {real} and the discrete sites "
            f"{sorted(discrete)} together; put them in blocks of their own."
        )
    flat, unflatten = flatten_sites(position, names)

    def log_density(x):
        return logdensity_fn({**position, **unflatten(x)})

    float_type = jnp.result_type(flat.dtype, float) if discrete else flat.dtype
    shape = jax.ShapeDtypeStruct(flat.shape, float_type)
    if discrete:
        return _plan_discrete(log_density, shape, flat.dtype, discrete, colors or {})
    found = structure(log_density, shape)
    why_not = why_not_gaussian(found)
    if why_not:
        raise ModelError(
            f"BlockGibbs: {sorted(names)} are not jointly Gaussian given the other sites: the "
            f"log-density {why_not}. {advice(names, set(position) - set(names))}"
        )
    return Block(names, "gaussian", {}, found.separable)


def _plan_discrete(log_density, shape, int_type, discrete, colors):
    names, degree = tuple(discrete), np.inf
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", DeprecationWarning)  # of JAX, for a one-hot of floats
            found = structure(log_density, shape)
        if found.true_gradient:
            degree = found.degree
    except (TypeError, ValueError, DeprecationWarning):
        pass  # it only accepts integers, as indices for example
    if degree <= 1 and all(len(x) == 2 for x in discrete.values()):
        return Block(names, "bernoulli", discrete)
    size = shape.shape[1]
    if any(name in colors for name in names):
        (name,) = names  # declared colours are those of one site
        _, labels = np.unique(np.ravel(colors[name]), return_inverse=True)
        return Block(names, "coloured", discrete, False, labels, degree)
    if size == 1:
        return Block(names, "sequential", discrete)
    if (
        degree == np.inf
    ):  # the log-density is evaluated at integers, so its program at integers counts
        shape = jax.ShapeDtypeStruct(shape.shape, int_type)
    graph = interactions(lambda x: log_density(x["x"]), {"x": shape})
    labels = None if graph is None else greedy_colors(graph)
    if labels is None or labels.max() + 1 == size:
        return Block(names, "sequential", discrete)
    return Block(names, "coloured", discrete, False, labels, degree)


def advice(names: Iterable[str], others: Iterable[str]) -> str:
    """The remedy for real sites that block Gibbs sampling cannot draw, for error messages."""
    names, others = sorted(names), sorted(others)
    if not others:
        return f"Move {names} by another kernel, `MALA(model)`."
    return (
        "Move them by a kernel of their own: `numpyro.infer.Gibbs([(MALA(model), "
        f"{names}), (BlockGibbs(model), {others})])`."
    )
