# SPDX-License-Identifier: Apache-2.0
r"""The path that annealing takes, and the transitions along it.

.. math:: \log π_β(x) = (1 - β) \log q(x) + β \log\tilde p(x), \qquad 0 ≤ β ≤ 1

from a normalised reference q, which can be drawn, to the unnormalised density. Real coordinates are
moved by MALA, preconditioned by a fixed linear map and a scale for every temperature; blocks of
sites with simple conditionals are drawn exactly, as in block Gibbs sampling. Both leave
:math:`π_β` invariant.

Reference: Neal, *Annealed importance sampling*, 2001; Gelman, Meng, *Simulating normalizing
constants: from importance sampling to bridge sampling to path sampling*, 1998.
"""

from collections.abc import Callable
from typing import NamedTuple

import blackjax
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from numpyro_ebm.log_normalizers.gaussian import Gaussian
from numpyro_ebm.log_normalizers.particles import by_problem, to_particles
from numpyro_ebm.program.tempered_form import Tempered
from numpyro_ebm.samplers.block_gibbs import draw_block
from numpyro_ebm.samplers.gibbs_blocks import Block
from numpyro_ebm.samplers.per_row import per_row
from numpyro_ebm.samplers.positions import flatten_sites
from numpyro_ebm.types import LogDensity, SiteValues

__all__ = ["Path", "Tuning", "sweep_particles"]

TARGET_ACCEPTANCE = 0.574
ADAPTATION_RATE = 0.5


class Path(NamedTuple):
    """From a reference to a target.

    - **log_densities** - maps positions, a dict of arrays of shape (n, ...), to the normalised
      log-density of the reference and the log-density of the target, of shape (n,) each.
    - **draw** - ``(rng_key, n) -> position``, where particles start: draws of the reference.
    - **real** - names of the sites that MALA moves.
    - **blocks** - blocks of sites that are drawn from their conditionals.
    - **precondition** - :class:`Gaussian` in whose coordinates MALA moves, or ``None``.
    - **num_problems** - how many log Z there are.
    """

    log_densities: Callable[..., tuple[jax.Array, jax.Array]]
    draw: Callable[..., SiteValues]
    real: tuple[str, ...]
    blocks: tuple[Block, ...]
    precondition: Gaussian | None
    num_problems: int = 1

    def tempered(self, beta: ArrayLike) -> LogDensity:
        """The log-density at inverse temperatures ``beta``, a scalar or of shape (n,)."""

        def log_density(position):
            reference, target = self.log_densities(position)
            return reference + beta * (target - reference)

        return log_density

    def log_ratio(self, position: SiteValues) -> jax.Array:
        """Target over reference, of shape (n,)."""
        reference, target = self.log_densities(position)
        return target - reference


class Tuning(NamedTuple):
    """What MALA is tuned with.

    - **log_step** - logarithm of the step size in scaled coordinates, of shape (problems,).
    - **scale** - scale of every preconditioned coordinate, of shape (problems, D).
    """

    log_step: jax.Array
    scale: jax.Array


def sweep_particles(
    rng_key: jax.Array,
    path: Path,
    position: SiteValues,
    beta: jax.Array,
    tuning: Tuning | None,
    num_sweeps: int,
    *,
    adapt: bool = False,
) -> tuple[SiteValues, Tuning | None]:
    """Move all particles ``num_sweeps`` times at inverse temperature ``beta``.

    :param rng_key: random key.
    :param Path path: the path.
    :param dict position: arrays of shape (n, ...).
    :param beta: of shape (n,).
    :param Tuning tuning: the tuning; ``None`` where nothing is moved by MALA.
    :param int num_sweeps: each a step of MALA and a draw of every block.
    :param bool adapt: adapt the step size to the mean acceptance as the sweeps go on.
    :return: new position and new tuning.
    """
    log_density = path.tempered(beta)
    blocks = [
        block._replace(form=block.form._replace(beta=beta))
        if isinstance(block.form, Tempered)
        else block
        for block in path.blocks
    ]
    keys = jax.random.split(rng_key, num_sweeps)
    mala = _mala(path, log_density, position, tuning) if path.real else None

    def adapted(tuning, accepted):
        step = ADAPTATION_RATE * (accepted - TARGET_ACCEPTANCE) if adapt else 0.0
        return tuning._replace(log_step=tuning.log_step + step)

    if mala and not path.blocks:  # the gradient is kept from one sweep to the next

        def move(carry, rng_key):
            state, tuning = carry
            state, accepted = mala.move(rng_key, state, tuning, position)
            return (state, adapted(tuning, accepted)), None

        (state, tuning), _ = lax.scan(move, (mala.enter(position), tuning), keys)
        return mala.leave(state, position), tuning

    def sweep(carry, rng_key):
        position, tuning = carry
        key_move, key_draw = jax.random.split(rng_key)
        if mala:
            state, accepted = mala.move(key_move, mala.enter(position), tuning, position)
            position, tuning = mala.leave(state, position), adapted(tuning, accepted)
        block_keys = jax.random.split(key_draw, len(path.blocks))
        for key, block in zip(block_keys, blocks, strict=True):
            position = {**position, **draw_block(key, position, log_density, block)}
        return (position, tuning), None

    return lax.scan(sweep, (position, tuning), keys)[0]


class _Mala(NamedTuple):
    """MALA of all particles at once.

    - **enter** - ``position -> state``, in the preconditioned coordinates.
    - **move** - ``(rng_key, state, tuning, position) -> state, acceptance`` of every problem.
    - **leave** - ``(state, position) -> position``.
    """

    enter: Callable
    move: Callable
    leave: Callable


def _mala(path, log_density, position, tuning):
    num = len(position[path.real[0]])
    scale = to_particles(tuning.scale, num)
    kernel = jax.vmap(blackjax.mala.build_kernel(), (0, 0, None, 0))
    _, unflatten = flatten_sites(position, path.real)

    def to_sites(y, position):
        return {**position, **unflatten(path.precondition.restore(scale * y))}

    def density_given(position):
        return per_row(lambda y: log_density(to_sites(y, position)))

    def enter(position):
        y = path.precondition.standardize(flatten_sites(position, path.real)[0]) / scale
        return jax.vmap(lambda y: blackjax.mala.init(y, density_given(position)))(y)

    def move(rng_key, state, tuning, position):
        step_size = to_particles(jnp.exp(tuning.log_step), num)
        keys = jax.random.split(rng_key, num)
        state, info = kernel(keys, state, density_given(position), step_size)
        accepted = by_problem(info.acceptance_rate, tuning.log_step)
        # A particle of density zero cannot move, and says nothing about step sizes.
        return state, jnp.mean(jnp.nan_to_num(accepted), 0)

    def leave(state, position):
        return to_sites(state.position, position)

    return _Mala(enter, move, leave)
