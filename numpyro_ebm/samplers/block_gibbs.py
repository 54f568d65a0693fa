# SPDX-License-Identifier: Apache-2.0
r"""Block Gibbs sampling of Gaussian and finite discrete blocks, in BlackJAX's shape.

.. math:: x_B' \sim π(x_B \mid x_{-B}) \quad \text{for every block } B \text{ in turn}

Every block is drawn exactly, so that nothing is rejected and nothing has to be tuned:
:mod:`numpyro_ebm.samplers.gibbs_blocks` finds out how. Use it for restricted Boltzmann machines,
for Ising and Potts models, and wherever else conditionals are Gaussian, Bernoulli, or those of
coordinates that do not interact; use MALA for real sites whose conditionals are not Gaussian.

Reference: Geman, Geman, *Stochastic relaxation, Gibbs distributions, and the Bayesian restoration
of images*, 1984; blocks of restricted Boltzmann machines: Hinton, *Training products of experts by
minimizing contrastive divergence*, 2002; colours: Gonzalez, Low, Gretton, Guestrin, *Parallel Gibbs
sampling: from colored fields to thin junction trees*, AISTATS 2011.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from numpyro_ebm._compat import SamplingAlgorithm, build_sampling_algorithm
from numpyro_ebm.samplers.chromatic_gibbs import draw_coloured
from numpyro_ebm.samplers.gaussian_conditional import expand_quadratic
from numpyro_ebm.samplers.gibbs_blocks import Block
from numpyro_ebm.samplers.indicator_gibbs import draw_one_by_one
from numpyro_ebm.samplers.monomial_gibbs import draw_by_monomials, plan_monomials
from numpyro_ebm.samplers.positions import flatten_sites
from numpyro_ebm.types import LogDensity, SiteValues

__all__ = [
    "BlockGibbsChainState",
    "BlockGibbsInfo",
    "as_top_level_api",
    "build_kernel",
    "draw_block",
    "init",
]


class BlockGibbsChainState(NamedTuple):
    """State of all chains, one a row.

    - **position** - dict of arrays of shape (rows, ...).
    - **logdensity** - log π of every row, of shape (rows,).
    """

    position: SiteValues
    logdensity: jax.Array


class BlockGibbsInfo(NamedTuple):
    """Information on one sweep.

    - **is_divergent** - rows whose new log-density is not finite, of shape (rows,): the conditional
      of a Gaussian block has no finite integral there, or the density itself is broken.
    """

    is_divergent: jax.Array


def draw_block(
    rng_key: jax.Array,
    position: SiteValues,
    logdensity_fn: LogDensity,
    block: Block,
    *,
    backwards: bool = False,
) -> SiteValues:
    """Draw one block given the rest.

    :param rng_key: random key.
    :param dict position: arrays of shape (rows, ...) by name.
    :param logdensity_fn: as in :func:`~numpyro_ebm.samplers.gibbs_blocks.plan_block`.
    :param Block block: what to draw.
    :param bool backwards: visit the colours, or the coordinates, in the opposite order.
    :return: dict of the new values of the block's sites.

    **Example**

    >>> import jax, jax.numpy as jnp
    >>> from numpyro_ebm.samplers.block_gibbs import draw_block
    >>> from numpyro_ebm.samplers.gibbs_blocks import Block
    >>> log_density = lambda x: -0.5 * jnp.sum(x["v"] ** 2, -1)
    >>> position = {"v": jnp.zeros((3, 2))}
    >>> block = Block(("v",), "gaussian", {}, is_diagonal=True)
    >>> draw_block(jax.random.key(0), position, log_density, block)["v"].shape
    (3, 2)
    """
    if block.kind in ("coloured", "sequential"):
        sweep = plan_monomials(block)
        if sweep is not None:
            return draw_by_monomials(rng_key, position, block, sweep, backwards=backwards)
    if block.kind == "sequential" and block.form is not None:
        return draw_one_by_one(rng_key, position, block, backwards=backwards)
    if block.kind == "sequential":
        return _draw_sequential(rng_key, position, logdensity_fn, block, backwards)
    if block.kind == "coloured":
        return draw_coloured(rng_key, position, logdensity_fn, block, backwards=backwards)
    flat, unflatten = flatten_sites(position, block.names)

    def log_density(x):
        return logdensity_fn({**position, **unflatten(x)})

    if block.kind == "gaussian":
        form = expand_quadratic(log_density, jnp.zeros_like(flat), block.is_diagonal)
        return unflatten(form.draw(rng_key))
    sizes = {name: np.prod(position[name].shape[1:], dtype=int) for name in block.names}
    low, high = (
        np.concatenate([np.full(sizes[name], block.values[name][i]) for name in block.names])
        for i in (0, 1)
    )
    start = jnp.broadcast_to(low, flat.shape).astype(jnp.result_type(flat.dtype, float))
    # Rows are independent: the gradient of their sum has the gradient of every row.
    log_odds = (high - low) * jax.grad(lambda x: jnp.sum(log_density(x)))(start)
    bits = jax.random.bernoulli(rng_key, jax.nn.sigmoid(log_odds))
    return unflatten(jnp.where(bits, high, low).astype(flat.dtype))


def init(position: SiteValues, logdensity_fn: LogDensity) -> BlockGibbsChainState:
    """State of the chains at a position."""
    return BlockGibbsChainState(position, logdensity_fn(position))


def build_kernel(
    reversible: bool = False,
) -> Callable[..., tuple[BlockGibbsChainState, BlockGibbsInfo]]:
    """Build the kernel ``(rng_key, state, logdensity_fn, blocks) -> (state, info)``.

    :param bool reversible: follow every sweep by one in the opposite order. A sweep in a fixed
        order leaves π invariant, but is not reversible; there and back again it is.
    """

    def kernel(rng_key, state, logdensity_fn, blocks):
        position = state.position
        order = [(block, False) for block in blocks]
        if reversible:
            order += [(block, True) for block in reversed(blocks)]
        for key, (block, backwards) in zip(
            jax.random.split(rng_key, len(order)), order, strict=True
        ):
            drawn = draw_block(key, position, logdensity_fn, block, backwards=backwards)
            position = {**position, **drawn}
        new_state = init(position, logdensity_fn)
        return new_state, BlockGibbsInfo(~jnp.isfinite(new_state.logdensity))

    return kernel


def as_top_level_api(logdensity_fn: LogDensity, blocks: Sequence[Block]) -> SamplingAlgorithm:
    """A BlackJAX ``SamplingAlgorithm`` with ``init`` and ``step``; one step is one sweep.

    :param logdensity_fn: maps a dict of arrays of shape (rows, ...) to log π of shape (rows,).
    :param blocks: sequence of :class:`~numpyro_ebm.samplers.gibbs_blocks.Block`, visited in order.

    **Example**

    >>> import jax, jax.numpy as jnp
    >>> from numpyro_ebm.samplers.block_gibbs import as_top_level_api
    >>> from numpyro_ebm.samplers.gibbs_blocks import plan_block
    >>> log_density = lambda x: jnp.sum(x["h"] * x["v"] - 0.5 * x["v"] ** 2, -1)
    >>> position = {"v": jnp.zeros((3, 2)), "h": jnp.zeros((3, 2), int)}
    >>> blocks = [plan_block(log_density, position, [name], {"h": [0, 1]}) for name in "vh"]
    >>> gibbs = as_top_level_api(log_density, blocks)
    >>> state, info = gibbs.step(jax.random.key(0), gibbs.init(position))
    >>> bool(info.is_divergent.any())
    False
    """
    return build_sampling_algorithm(build_kernel(), init, logdensity_fn, kernel_args=(blocks,))


def _draw_sequential(rng_key, position, logdensity_fn, block, backwards):
    for name in reversed(block.names) if backwards else block.names:
        flat, unflatten = flatten_sites(position, (name,))
        rows, size = flat.shape
        values = jnp.asarray(block.values[name], flat.dtype)[:, None, None]

        def draw_coordinate(flat, at, position=position, unflatten=unflatten, values=values):
            key, coordinate = at
            candidates = jnp.where(jnp.arange(flat.shape[1]) == coordinate, values, flat)
            logits = jax.vmap(lambda x: logdensity_fn({**position, **unflatten(x)}))(candidates)
            chosen = jax.random.categorical(key, logits, axis=0)  # (rows,)
            return candidates[chosen, jnp.arange(len(flat))], None

        rng_key, key_site = jax.random.split(rng_key)
        keys = jax.random.split(key_site, size)
        at = (keys, jnp.arange(size))
        flat, _ = lax.scan(draw_coordinate, flat, at, reverse=backwards)
        position = {**position, **unflatten(flat)}
    return {name: position[name] for name in block.names}
