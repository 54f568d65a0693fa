# SPDX-License-Identifier: Apache-2.0
r"""Cluster moves of Ising and Potts models (Swendsen-Wang), in BlackJAX's shape.

.. math:: \log π(x) = \sum_i h_i(x_i) + \sum_{ij} J_{ij}\, [x_i = x_j], \qquad
    P(b_{ij} = 1 \mid x) = [x_i = x_j]\, (1 - e^{-J_{ij}}), \qquad
    P(x_C = a \mid b) \propto \exp \sum_{i \in C} h_i(a)

Pairs of equal values are bound at random, and every cluster C of bound coordinates is drawn anew
as a whole, given the bonds: nothing is rejected, nothing is tuned, and the step is reversible. Use
it where couplings are strong and fields weak: at the critical point of a lattice, where coordinates
that are drawn one by one take longer the larger the lattice is, clusters hardly do. A strong field
holds large clusters where they are; then :mod:`numpyro_ebm.samplers.block_gibbs` is better.

Coordinates of two states may have couplings of either sign: a bond of :math:`J_{ij} < 0` holds two
different values, with probability :math:`1 - e^{J_{ij}}`, and a cluster is turned over as a whole.
It is right for all signs, and fast where no cycle of couplings is frustrated.

What log π has beside these terms, in couplings that were traced when they were read, is left to a
Metropolis test of every row, so that the law is π whatever they are.

Reference: Swendsen, Wang, *Nonuniversal critical dynamics in Monte Carlo simulations*, Physical
Review Letters 1987; as auxiliary variables, with fields: Edwards, Sokal, *Generalization of the
Fortuin-Kasteleyn-Swendsen-Wang representation and Monte Carlo algorithm*, Physical Review D 1988.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from numpyro_ebm._compat import SamplingAlgorithm, build_sampling_algorithm
from numpyro_ebm.program.potts import Potts
from numpyro_ebm.samplers.connected_components import connected_components
from numpyro_ebm.samplers.positions import flatten_sites
from numpyro_ebm.types import LogDensity, SiteValues

__all__ = [
    "SwendsenWangChainState",
    "SwendsenWangInfo",
    "as_top_level_api",
    "build_kernel",
    "init",
]


class SwendsenWangChainState(NamedTuple):
    """State of all chains, one a row.

    - **position** - dict of arrays of shape (rows, ...).
    - **logdensity** - log π of every row, of shape (rows,).
    """

    position: SiteValues
    logdensity: jax.Array


class SwendsenWangInfo(NamedTuple):
    """Information on one step.

    - **acceptance_rate** - of the Metropolis test, (rows,); 1 where log π is known to be a sum of
      couplings and fields.
    - **num_clusters** - clusters of every row, single coordinates among them, (rows,).
    - **is_divergent** - rows whose proposal has no finite log-density, (rows,).
    """

    acceptance_rate: jax.Array
    num_clusters: jax.Array
    is_divergent: jax.Array


def init(position: SiteValues, logdensity_fn: LogDensity) -> SwendsenWangChainState:
    """State of the chains at a position."""
    return SwendsenWangChainState(position, logdensity_fn(position))


def build_kernel() -> Callable[..., tuple[SwendsenWangChainState, SwendsenWangInfo]]:
    """Build the kernel ``(rng_key, state, logdensity_fn, potts) -> (state, info)``."""

    def kernel(rng_key, state, logdensity_fn, potts):
        key_bonds, key_values, key_test = jax.random.split(rng_key, 3)
        flat, unflatten = flatten_sites(state.position, potts.names)
        values = jnp.asarray(potts.values, flat.dtype)
        x = jnp.argmax(flat[..., None] == values, -1)
        clusters = _clusters(key_bonds, x, potts)
        moved = _values_of_clusters(key_values, x, clusters, potts)
        proposal = jnp.take_along_axis(values[None], moved[..., None], -1)[..., 0]
        new = init({**state.position, **unflatten(proposal)}, logdensity_fn)
        is_root = clusters == jnp.arange(x.size).reshape(x.shape)
        is_divergent = ~jnp.isfinite(new.logdensity)
        accept = jnp.ones_like(new.logdensity)
        if not potts.is_checked:
            rest = new.logdensity - state.logdensity - _sum(moved, potts) + _sum(x, potts)
            accept = jnp.where(is_divergent, 0.0, jnp.exp(jnp.minimum(rest, 0.0)))
            taken = jax.random.uniform(key_test, accept.shape, accept.dtype) < accept
            position = unflatten(jnp.where(taken[:, None], proposal, flat))
            new = SwendsenWangChainState(
                {**state.position, **position}, jnp.where(taken, new.logdensity, state.logdensity)
            )
        return new, SwendsenWangInfo(accept, jnp.sum(is_root, -1), is_divergent)

    return kernel


def _bonds(x, potts):
    """Which pairs are as their coupling likes them, and how much it likes that."""
    first, second = potts.pairs.T
    likes_equal, strength = True, jnp.maximum(potts.couplings, 0.0)
    if potts.is_binary:
        likes_equal, strength = potts.couplings >= 0, jnp.abs(potts.couplings)
    return (x[:, first] == x[:, second]) == likes_equal, strength


def _clusters(rng_key, x, potts):
    is_liked, strength = _bonds(x, potts)
    uniform = jax.random.uniform(rng_key, is_liked.shape, strength.dtype)
    return connected_components(
        potts.pairs, is_liked & (uniform < -jnp.expm1(-strength)), x.shape[1]
    )


def _values_of_clusters(rng_key, x, clusters, potts):
    """New states of all coordinates; of coordinates of two states, turned over or as they are."""
    fields = jnp.broadcast_to(potts.fields, (*x.shape, potts.fields.shape[-1]))
    if potts.is_binary:
        turned = x[..., None] ^ jnp.arange(2)
        fields = jnp.take_along_axis(fields, turned, -1)
    logits = jnp.zeros((x.size, fields.shape[-1]), fields.dtype)
    logits = logits.at[jnp.ravel(clusters)].add(jnp.reshape(fields, logits.shape))
    logits = logits + jax.random.gumbel(rng_key, logits.shape, logits.dtype)
    drawn = jnp.argmax(logits, -1)[clusters]
    return x ^ drawn if potts.is_binary else drawn


def _sum(x, potts):
    """What couplings and fields say of log π."""
    is_liked, strength = _bonds(x, potts)
    fields = jnp.broadcast_to(potts.fields, (*x.shape, potts.fields.shape[-1]))
    fields = jnp.take_along_axis(fields, x[..., None], -1)[..., 0]
    return jnp.sum(strength * is_liked, -1) + jnp.sum(fields, -1)


def as_top_level_api(logdensity_fn: LogDensity, potts: Potts) -> SamplingAlgorithm:
    """A BlackJAX ``SamplingAlgorithm`` with ``init`` and ``step``.

    :param logdensity_fn: maps a dict of arrays of shape (rows, ...) to log π of shape (rows,).
    :param Potts potts: its couplings and fields, from
        :func:`~numpyro_ebm.program.potts.read_potts`.

    **Example**

    >>> import jax, jax.numpy as jnp
    >>> from numpyro_ebm.program.multi_affine import multi_affine
    >>> from numpyro_ebm.program.potts import read_potts
    >>> from numpyro_ebm.samplers.swendsen_wang import as_top_level_api
    >>> ring = lambda x: jnp.sum(x["s"] == jnp.roll(x["s"], 1, -1), -1) * 1.0
    >>> position = {"s": jnp.zeros((5, 8), int)}
    >>> form = multi_affine(lambda _, x: ring(x), {}, position, {"s": [0, 1, 2]})
    >>> algorithm = as_top_level_api(ring, read_potts(form))
    >>> state, info = algorithm.step(jax.random.key(0), algorithm.init(position))
    >>> state.position["s"].shape, info.num_clusters.shape
    ((5, 8), (5,))
    """
    return build_sampling_algorithm(build_kernel(), init, logdensity_fn, kernel_args=(potts,))
