# SPDX-License-Identifier: Apache-2.0
r"""Whether chains of rows are draws of the model: their energies, and those after further steps.

.. math:: Δ = E\,[E(v^-; θ) - E(v^+; θ)] = 0 \quad\text{if}\quad v^- \sim p(v \mid x; θ)

where :math:`v^+` is :math:`v^-` after steps that leave p(v | x; θ) invariant: Metropolis steps of
random lengths, up to twice the spread of the rows, and those of the kernel. The long ones come to
modes that the kernel does not, in few dimensions; in many they are rejected, and say nothing. A row
has one chain, so that nothing can be compared within a row: Δ is a mean over rows.
"""

import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_ebm._compat import find_stack_level, not_jax_tracer
from numpyro_ebm.errors import ConvergenceWarning
from numpyro_ebm.types import SiteValues

__all__ = ["energy_drop", "warn_if_not_there"]

LONG_STEPS, SHORTEST, LONGEST = 32, 0.05, 2.0
"""How many long steps there are, and their lengths in units of the spread of the rows."""

LARGEST_DROP = 0.25
"""Nats of Δ above which a run warns, where they are four standard errors as well."""

FEWEST_ROWS = 16


def energy_drop(
    rng_key: jax.Array,
    log_density: Callable[[SiteValues], jax.Array],
    move: Callable[[jax.Array, SiteValues], SiteValues],
    chains: SiteValues,
    spread: SiteValues | None,
) -> jax.Array:
    """By how much the energy of every chain falls in further steps, (rows,).

    :param rng_key: random key.
    :param log_density: log p̃ of chains, (rows,).
    :param move: steps of the kernel, ``(rng_key, chains) -> chains``.
    :param dict chains: positions by site, rows leading.
    :param dict spread: standard deviations of the coordinates of the sites that take long steps,
        rows leading; ``None`` for no long steps.
    """
    key_long, key_move = jax.random.split(rng_key)
    before = log_density(chains)
    if spread is not None:
        chains = _take_long_steps(key_long, log_density, chains, before, spread)
    return log_density(move(key_move, chains)) - before


def _take_long_steps(rng_key, log_density, chains, value, spread):
    def like(x, position):
        return jnp.reshape(x, (-1,) + (1,) * (jnp.ndim(position) - 1))

    def step(carry, key):
        position, value = carry
        key_length, key_noise, key_accept = jax.random.split(key, 3)
        lengths = jnp.log(SHORTEST), jnp.log(LONGEST)
        length = jnp.exp(jax.random.uniform(key_length, value.shape, value.dtype, *lengths))
        proposal = dict(position)
        for i, (name, scale) in enumerate(spread.items()):
            x = position[name]
            noise = jax.random.normal(jax.random.fold_in(key_noise, i), x.shape, x.dtype)
            proposal[name] = x + like(length, x) * scale * noise
        new = log_density(proposal)
        accept = jnp.log(jax.random.uniform(key_accept, value.shape)) < new - value
        position = {k: jnp.where(like(accept, x), proposal[k], x) for k, x in position.items()}
        return (position, jnp.where(accept, new, value)), None

    return jax.lax.scan(step, (chains, value), jax.random.split(rng_key, LONG_STEPS))[0][0]


def warn_if_not_there(drop: jax.Array, begun: jax.Array) -> None:
    """Warn :class:`~numpyro_ebm.ConvergenceWarning` if the energies of chains do not stay.

    :param drop: what :func:`energy_drop` found; traced values are not looked at.
    :param begun: which of the chains have begun, (rows,).
    """
    if not not_jax_tracer(drop):
        return
    falls = np.asarray(drop, float)[np.asarray(begun)]
    if len(falls) < FEWEST_ROWS:
        return
    mean, error = falls.mean(), falls.std(ddof=1) / len(falls) ** 0.5
    if abs(mean) <= max(LARGEST_DROP, 4 * error):
        return
    way = "fall" if mean > 0 else "rise"
    warnings.warn(
        ConvergenceWarning(
            "ContrastiveDivergence: the persistent chains, one of each row, are not where the "
            f"model is: in as many kernel steps again, and {LONG_STEPS} Metropolis steps of up to "
            f"twice the spread of the rows, the energies of {len(falls)} of them {way} by "
            f"{abs(mean):.3g} ± {error:.2g} nats, and should stay. Either the energy outruns them, "
            "or they do not come from mode to mode, and the gradient is not that of the "
            "likelihood. Set `reset_probability=1.0, adjusted_resets=True` and an `initial` that "
            "covers the rows, take more steps of the kernel, or lower the learning rate."
        ),
        stacklevel=find_stack_level(),
    )
