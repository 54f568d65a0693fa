# SPDX-License-Identifier: Apache-2.0
r"""Conditionals of discrete coordinates from log π in their indicators.

.. math:: π(x_i = k \mid x_{-i}) \propto \exp(∂ \log π / ∂X_{ik})

One gradient holds the conditionals of all coordinates at once, and of a coloured block's those of a
colour are drawn from it together. Where log π has degree two, :math:`\log π = b^\top X + \tfrac12
X^\top H X`, a sweep of coordinates that all interact takes one slice of H for each, a product of
matrices in all. :mod:`numpyro_ebm.program.multi_affine` finds the form,
:mod:`numpyro_ebm.samplers.block_gibbs` holds the kernel.

Reference: Geman, Geman, *Stochastic relaxation, Gibbs distributions, and the Bayesian restoration
of images*, 1984.
"""

import jax
import jax.numpy as jnp
from jax import lax

from numpyro_ebm.program.multi_affine import MultiAffine
from numpyro_ebm.program.tempered_form import Tempered
from numpyro_ebm.samplers.gibbs_blocks import Block
from numpyro_ebm.samplers.positions import flatten_sites
from numpyro_ebm.types import SiteValues

__all__ = ["conditional_logits", "draw_one_by_one"]


def conditional_logits(form: MultiAffine | Tempered, position: SiteValues) -> jax.Array:
    """log π(x_i = k | x_{-i}) up to a constant in k, of shape (rows, coordinates, states).

    :param form: log π in the indicators of its discrete sites, affine in each coordinate.
    :param dict position: values of all sites, of shape (rows, ...).
    :return: -inf at states that a coordinate does not have.

    **Example**

    >>> import jax.numpy as jnp
    >>> from numpyro_ebm.program.multi_affine import multi_affine
    >>> from numpyro_ebm.samplers.indicator_gibbs import conditional_logits
    >>> chain = lambda _, x: jnp.sum(2.0 * x["s"][:, 1:] * x["s"][:, :-1], -1)
    >>> position = {"s": jnp.array([[0, 1, 0]])}
    >>> form = multi_affine(chain, {}, position, {"s": [0, 1]})
    >>> conditional_logits(form, position)[0, :, 1].tolist()
    [2.0, 0.0, 2.0]
    """
    flat, _ = flatten_sites(position, form.names)
    slopes = form.secants({}, form.indicators(flat), position)
    assert slopes is not None  # a block has none but affine ones
    return form.logits(slopes)


def draw_one_by_one(
    rng_key: jax.Array, position: SiteValues, block: Block, *, backwards: bool = False
) -> SiteValues:
    """Draw the coordinates of a block one after the other.

    :param rng_key: random key.
    :param dict position: values of all sites, of shape (rows, ...).
    :param Block block: a sequential block with a form.
    :param bool backwards: the last one first.
    :return: dict of the new values of the block's sites.
    """
    form = block.form
    assert form is not None
    flat, _ = flatten_sites(position, form.names)
    indicators = form.indicators(flat)
    own = form.coordinates(block.names)
    width = form.values.shape[1]
    noise = jax.random.gumbel(rng_key, (len(own), len(flat), width), indicators.dtype)
    slopes_of = form.slopes_one_by_one(position)
    is_state = jnp.asarray(form.is_state)

    def draw(indicators, at):
        i, noise = at
        slopes = slopes_of(indicators, i)
        if form.is_binary:
            logits = jnp.stack([jnp.zeros_like(slopes), slopes], -1)
        else:
            logits = jnp.where(is_state[i], slopes, -jnp.inf)
        chosen = jnp.argmax(logits + noise, -1)
        states = chosen if form.is_binary else jax.nn.one_hot(chosen, width)
        return indicators.at[:, i].set(states.astype(indicators.dtype)), chosen

    _, chosen = lax.scan(draw, indicators, (own, noise), reverse=backwards)
    drawn = jnp.asarray(form.values)[own, chosen.T].astype(flat.dtype)
    _, unflatten = flatten_sites(position, block.names)
    return unflatten(drawn)
