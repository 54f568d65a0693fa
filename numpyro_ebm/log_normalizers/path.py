# SPDX-License-Identifier: Apache-2.0
r"""The path that annealing takes, and the transitions along it.

.. math:: \log π_β(x) = (1 - β) \log q(x) + β \log\tilde p(x), \qquad 0 ≤ β ≤ 1

from a normalised reference q, which can be drawn, to the unnormalised density. Real coordinates are
moved by MALA, preconditioned by a fixed linear map and a scale for every temperature; blocks of
sites with simple conditionals are drawn exactly, as in block Gibbs sampling. Both leave
:math:`π_β` invariant.

Several *problems* may run side by side, one log Z each: particles then come in the order of the
problems, particle i belonging to problem i modulo their number.

Reference: Neal, *Annealed importance sampling*, 2001; Gelman, Meng, *Simulating normalizing
constants: from importance sampling to bridge sampling to path sampling*, 1998.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import blackjax
import jax
import jax.numpy as jnp
from jax import lax

from numpyro_ebm.samplers.block_gibbs import draw_block
from numpyro_ebm.samplers.per_row import per_row

__all__ = [
    "Gaussian",
    "Path",
    "Tuning",
    "by_problem",
    "flatten",
    "sweeps",
    "to_particles",
    "unflatten",
]

TARGET_ACCEPTANCE = 0.574
ADAPTATION_RATE = 0.5


class Gaussian(NamedTuple):
    """A Gaussian of every problem.

    - **center** - of shape (problems, D).
    - **factor** - Cholesky factor of its covariance, of shape (problems, D, D); of shape
      (problems, D) where that is diagonal.
    """

    center: jax.Array
    factor: jax.Array

    @property
    def is_diagonal(self):
        return jnp.ndim(self.factor) == 2

    @property
    def log_det(self):
        """log det of the factor, of shape (problems,)."""
        diagonal = self.factor
        if not self.is_diagonal:
            diagonal = jnp.diagonal(self.factor, axis1=-2, axis2=-1)
        return jnp.sum(jnp.log(diagonal), -1)

    def standardize(self, x):
        """Coordinates in which it is standard, of points (n, D)."""
        gap = by_problem(x, self.center) - self.center
        if self.is_diagonal:
            return jnp.reshape(gap / self.factor, x.shape)
        columns = jnp.moveaxis(gap, 0, -1)
        z = lax.linalg.triangular_solve(self.factor, columns, left_side=True, lower=True)
        return jnp.reshape(jnp.moveaxis(z, -1, 0), x.shape)

    def restore(self, z):
        """Undo :meth:`standardize`."""
        z_rows = by_problem(z, self.center)
        if self.is_diagonal:
            return jnp.reshape(self.center + self.factor * z_rows, z.shape)
        return jnp.reshape(self.center + jnp.einsum("kij,pkj->pki", self.factor, z_rows), z.shape)

    def log_prob(self, x):
        """Normalised log-density of points (n, D), of shape (n,)."""
        constant = 0.5 * x.shape[-1] * math.log(2 * math.pi)
        shape = -0.5 * jnp.sum(self.standardize(x) ** 2, -1) - constant
        return jnp.reshape(by_problem(shape, self.center) - self.log_det, len(x))

    def sample(self, rng_key, num):
        """Draw ``num`` points, (num, D)."""
        shape = (num, self.center.shape[-1])
        return self.restore(jax.random.normal(rng_key, shape, self.center.dtype))

    def subset(self, index):
        """The marginal of some coordinates."""
        if self.is_diagonal:
            return self._replace(center=self.center[:, index], factor=self.factor[:, index])
        covariance = self.factor @ jnp.swapaxes(self.factor, -1, -2)
        factor = jnp.linalg.cholesky(covariance[:, index][:, :, index])
        return self._replace(center=self.center[:, index], factor=factor)


class Path(NamedTuple):
    """From a reference to a target.

    - **log_densities** - maps positions, a dict of arrays of shape (n, ...), to the normalised
      log-density of the reference and the log-density of the target, of shape (n,) each.
    - **draw** - ``(rng_key, n) -> position``, independent draws of the reference.
    - **real** - names of the sites that MALA moves.
    - **blocks** - blocks of sites that are drawn from their conditionals.
    - **precondition** - :class:`Gaussian` in whose coordinates MALA moves, or ``None``.
    - **num_problems** - how many log Z there are.
    """

    log_densities: Callable
    draw: Callable | None
    real: tuple
    blocks: tuple
    precondition: Gaussian | None
    num_problems: int = 1

    def tempered(self, beta):
        """The log-density at inverse temperatures ``beta``, a scalar or of shape (n,)."""

        def log_density(position):
            reference, target = self.log_densities(position)
            return reference + beta * (target - reference)

        return log_density

    def log_ratio(self, position):
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


def by_problem(x, like):
    """Particles (n, ...) as (particles, problems, ...), with the problems of ``like``."""
    return jnp.reshape(x, (-1, jnp.shape(like)[0], *jnp.shape(x)[1:]))


def to_particles(x, num):
    """What every problem has, (problems, ...), for each of ``num`` particles."""
    repeated = jnp.broadcast_to(x, (num // len(x), *jnp.shape(x)))
    return jnp.reshape(repeated, (num, *jnp.shape(x)[1:]))


def flatten(position, names):
    """Named sites as one array of shape (n, D)."""
    return jnp.concatenate([jnp.reshape(position[k], (len(position[k]), -1)) for k in names], 1)


def unflatten(flat, position, names):
    """Undo :func:`flatten`; ``position`` tells the shapes of one particle."""
    parts, start = {}, 0
    for name in names:
        shape = jnp.shape(position[name])[1:]
        stop = start + int(jnp.size(position[name]) // len(position[name]))
        parts[name] = jnp.reshape(flat[:, start:stop], (len(flat), *shape))
        start = stop
    return parts


def sweeps(rng_key, path, position, beta, tuning, num_sweeps, *, adapt=False):
    """Move all particles ``num_sweeps`` times at inverse temperature ``beta``.

    :param rng_key: random key.
    :param Path path: the path.
    :param dict position: arrays of shape (n, ...).
    :param beta: of shape (n,).
    :param Tuning tuning: the tuning; ``None`` where nothing is moved by MALA.
    :param int num_sweeps: each a step of MALA and a draw of every block.
    :param bool adapt: adapt the step size to the mean acceptance as the sweeps go on.
    :return: new position, new tuning, and the acceptance probability of every problem.
    """
    log_density = path.tempered(beta)
    keys = jax.random.split(rng_key, num_sweeps)
    total = jnp.zeros(path.num_problems, jnp.result_type(beta))
    if path.real:
        enter, move, leave = _langevin(path, log_density, position, tuning)

    def adapted(tuning, accepted):
        step = ADAPTATION_RATE * (accepted - TARGET_ACCEPTANCE) if adapt else 0.0
        return tuning._replace(log_step=tuning.log_step + step)

    def draw(rng_key, position):
        for key, block in zip(
            jax.random.split(rng_key, len(path.blocks)), path.blocks, strict=True
        ):
            position = {**position, **draw_block(key, position, log_density, block)}
        return position

    if not path.blocks:  # nothing moves but the chains, whose gradients are kept

        def sweep(carry, rng_key):
            state, tuning, total = carry
            state, accepted = move(rng_key, state, tuning, position)
            return (state, adapted(tuning, accepted), total + accepted), None

        start = enter(position), tuning, total
        (state, tuning, total), _ = lax.scan(sweep, start, keys)
        return leave(state, position), tuning, total / num_sweeps

    def sweep(carry, rng_key):
        position, tuning, total = carry
        key_move, key_draw = jax.random.split(rng_key)
        if path.real:
            state, accepted = move(key_move, enter(position), tuning, position)
            position, tuning = leave(state, position), adapted(tuning, accepted)
            total = total + accepted
        return (draw(key_draw, position), tuning, total), None

    (position, tuning, total), _ = lax.scan(sweep, (position, tuning, total), keys)
    return position, tuning, total / num_sweeps


def _langevin(path, log_density, position, tuning):
    """MALA of all particles at once: how to enter its coordinates, to move and to leave them."""
    num = len(position[path.real[0]])
    scale = to_particles(tuning.scale, num)
    kernel = jax.vmap(blackjax.mala.build_kernel(), (0, 0, None, 0))

    def to_sites(y, position):
        flat = path.precondition.restore(scale * y)
        return {**position, **unflatten(flat, position, path.real)}

    def one(position):
        return per_row(lambda y: log_density(to_sites(y, position)))

    def enter(position):
        y = path.precondition.standardize(flatten(position, path.real)) / scale
        return jax.vmap(lambda y: blackjax.mala.init(y, one(position)))(y)

    def move(rng_key, state, tuning, position):
        step_size = to_particles(jnp.exp(tuning.log_step), num)
        keys = jax.random.split(rng_key, num)
        state, info = kernel(keys, state, one(position), step_size)
        accepted = by_problem(info.acceptance_rate, tuning.log_step)
        # A particle of density zero has nowhere to go, and says nothing about step sizes.
        return state, jnp.mean(jnp.nan_to_num(accepted), 0)

    def leave(state, position):
        return to_sites(state.position, position)

    return enter, move, leave
