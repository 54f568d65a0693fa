# SPDX-License-Identifier: Apache-2.0
r"""Gibbs sampling by the monomials that hold a coordinate, where log π has degree three or more.

.. math:: \frac{∂ \log π}{∂X_v} = \sum_{t:\, v \in S_t} a_t \prod_{w \in S_t,\, w \neq v} X_w

A gradient of log π holds the conditionals of all coordinates, and a colour needs those of its own:
of the 561 ties of 34 people 17 at once, each from the 32 triangles that it may close. Colours are
slices of one array, coordinates that all interact are colours of one. Used where the sums of all
colours are much shorter than the operations of their gradients.

Reference: change statistics, Snijders, *Markov chain Monte Carlo estimation of exponential random
graph models*, Journal of Social Structure 2002; colours, Gonzalez, Low, Gretton, Guestrin,
*Parallel Gibbs sampling*, AISTATS 2011.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from numpyro_ebm.program.jaxprs import num_operations
from numpyro_ebm.program.multi_affine import MultiAffine
from numpyro_ebm.program.tempered_form import Tempered
from numpyro_ebm.samplers.gibbs_blocks import Block
from numpyro_ebm.samplers.positions import flatten_sites
from numpyro_ebm.types import SiteValues

__all__ = ["MonomialSweep", "draw_by_monomials", "plan_monomials"]

OPERATIONS_PER_FACTOR = 8  # of a gradient, in the time of reading one factor
MOST_PADDING = 4  # times the factors that there are


class MonomialSweep(NamedTuple):
    """The tables of a sweep. Made by :func:`plan_monomials`.

    - **form** - log π in indicators.
    - **members** - the coordinates of every colour, (colours, members), -1 where there are fewer.
    - **slots** - which indicator stands where in the array of the sweep, colour after colour.
    - **factors** - where the factors of every product stand,
      (colours, members, states, products, degree - 1).
    - **products** - which coefficient each has, (colours, members, states, products).
    - **coefficients** - of the products, and a zero.
    """

    form: MultiAffine | Tempered
    members: np.ndarray
    slots: np.ndarray
    factors: np.ndarray
    products: np.ndarray
    coefficients: Any


def plan_monomials(block: Block) -> MonomialSweep | None:
    """The tables of a sweep of a block; ``None`` where gradients are not seen to be slower.

    :param Block block: a coloured or sequential one.

    **Example**

    >>> import jax.numpy as jnp
    >>> from numpyro_ebm.program.multi_affine import multi_affine
    >>> from numpyro_ebm.samplers.gibbs_blocks import Block
    >>> from numpyro_ebm.samplers.monomial_gibbs import plan_monomials
    >>> all_of_three = lambda _, x: jnp.sum(x["s"], -1) * 0.1 + jnp.prod(x["s"] * 1.0, -1)
    >>> form = multi_affine(all_of_three, {}, {"s": jnp.zeros((1, 3), int)}, {"s": [0, 1]})
    >>> plan_monomials(Block(("s",), "sequential", {"s": [0, 1]}, form=form))
    """
    form = block.form
    if form is None or form.degree < 3:
        return None
    found = form.monomials()
    if found is None or not found.variables.shape[1]:
        return None
    own = form.coordinates(block.names)
    labels = (
        np.arange(len(own))
        if block.colors is None
        else np.unique(block.colors, return_inverse=True)[1]
    )
    number = int(labels.max()) + 1
    members = np.full((number, int(np.bincount(labels).max())), -1)
    order = np.argsort(labels, kind="stable")
    members[labels[order], _rank(labels[order])] = own[order]
    width = 1 if form.is_binary else form.values.shape[1]
    slots, places = _slots(members, len(form.values), width)
    tables = _tables(found.variables, places, members.size * width)
    if tables is None:
        return None
    factors, products = tables
    like = jax.ShapeDtypeStruct(
        (1, *form.values.shape[: 1 if form.is_binary else 2]), jnp.result_type(float)
    )
    slopes = form.cold.secants if isinstance(form, Tempered) else form.secants
    gradient = num_operations(jax.make_jaxpr(lambda x: slopes({}, x))(like))
    if OPERATIONS_PER_FACTOR * factors.size > number * gradient:
        return None
    shape = (*members.shape, width)
    return MonomialSweep(
        form,
        members,
        slots,
        factors.reshape(*shape, *factors.shape[1:]),
        products.reshape(*shape, -1),
        jnp.append(jnp.asarray(found.coefficients, like.dtype), 0.0),
    )


def draw_by_monomials(
    rng_key: jax.Array,
    position: SiteValues,
    block: Block,
    sweep: MonomialSweep,
    *,
    backwards: bool = False,
) -> SiteValues:
    """Draw the colours of a block one after the other.

    :param rng_key: random key.
    :param dict position: values of all sites, of shape (rows, ...).
    :param Block block: what to draw.
    :param MonomialSweep sweep: its tables.
    :param bool backwards: the last colour first.
    :return: dict of the new values of the block's sites.
    """
    form, (number, size, width) = sweep.form, sweep.products.shape[:3]
    flat, _ = flatten_sites(position, form.names)
    rows = len(flat)
    indicators = form.indicators(flat)
    ends = jnp.broadcast_to(jnp.asarray([0.0, 1.0], indicators.dtype), (rows, 2))
    x = jnp.concatenate([jnp.reshape(indicators, (rows, -1)), ends], 1)[:, sweep.slots]
    draw_noise = jax.random.logistic if form.is_binary else jax.random.gumbel
    noise = draw_noise(rng_key, (number, rows, size, width), x.dtype)
    scale, others = 1.0, None
    if isinstance(form, Tempered):
        scale, others = jnp.reshape(form.beta, (-1, 1, 1)), form.constant_slopes(indicators)
    if others is not None:
        others = jnp.reshape(others, (rows, -1, width))[:, sweep.members]
        noise = noise + jnp.moveaxis(others, 1, 0)
    if not form.is_binary:
        noise = jnp.where(jnp.asarray(form.is_state)[sweep.members][:, None], noise, -jnp.inf)

    def draw(x, at):
        color, factors, weights, noise = at
        slopes = jnp.sum(weights * jnp.prod(x[:, factors], -1), -1)  # (rows, members, states)
        logits = scale * slopes + noise
        if form.is_binary:
            new = chosen = logits[..., 0] > 0
        else:
            chosen = jnp.argmax(logits, -1)
            new = jax.nn.one_hot(chosen, width)
        new = jnp.reshape(new, (rows, -1)).astype(x.dtype)
        return lax.dynamic_update_slice(x, new, (0, color * size * width)), chosen

    weights = sweep.coefficients[sweep.products]
    at = (np.arange(number), sweep.factors, weights, noise)
    _, chosen = lax.scan(draw, x, at, reverse=backwards)
    chosen = jnp.moveaxis(chosen, 1, 0).reshape(rows, -1)
    own = form.coordinates(block.names)
    ravelled = sweep.members.ravel()
    place = np.zeros(len(form.values), int)
    place[ravelled[ravelled >= 0]] = np.flatnonzero(ravelled >= 0)
    states = chosen[:, place[own]].astype(int)
    _, unflatten = flatten_sites(position, block.names)
    return unflatten(jnp.asarray(form.values)[own, states].astype(flat.dtype))


def _slots(members, number, width):
    """What stands in every slot, an indicator or an end; and the slot of every indicator."""
    ravelled = members.ravel()
    others = np.setdiff1d(np.arange(number), ravelled)
    coordinates = np.concatenate([ravelled, others])
    zero, one = number * width, number * width + 1
    slots = coordinates[:, None] * width + np.arange(width)
    slots = np.append(np.where(coordinates[:, None] < 0, zero, slots).ravel(), one)
    places = np.zeros(number * width, int)
    held = slots < zero
    places[slots[held]] = np.flatnonzero(held)
    return slots, np.append(places, len(slots) - 1)  # -1, no variable, is the one


def _tables(variables, places, number):
    """Factors and products of the first slots, (slots, products, ...); ``None`` if mostly empty."""
    slots, one = places[variables], places[-1]
    terms, degree = slots.shape
    of, which, factors = [], [], []
    for i in range(degree):
        own = np.flatnonzero(slots[:, i] < number)
        of.append(slots[own, i])
        which.append(own)
        factors.append(np.delete(slots[own], i, 1))
    of, which, factors = map(np.concatenate, (of, which, factors))
    most = int(np.bincount(of, minlength=1).max(initial=1))
    if number * most > MOST_PADDING * len(of):
        return None
    order = np.argsort(of, kind="stable")
    place = of[order], _rank(of[order])
    all_factors = np.full((number, most, degree - 1), one, np.int32)
    all_factors[place] = factors[order]
    products = np.full((number, most), terms, np.int32)
    products[place] = which[order]
    return all_factors, products


def _rank(ordered):
    """The place of every element among its equals, in a sorted array."""
    return np.arange(len(ordered)) - np.searchsorted(ordered, ordered)
