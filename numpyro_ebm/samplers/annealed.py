# SPDX-License-Identifier: Apache-2.0
r"""Annealed Langevin dynamics, in BlackJAX's shape.

.. math:: x ← x + ε_k\,∇\log π_k(x) + \sqrt{2ε_k}\,ξ, \qquad \text{some steps at each level } k

from noise, through densities :math:`π_1, …, π_K` that get sharper, and at the end, where the levels
are noise scales σ, one step without noise to the mean of what was noised (Tweedie's formula),

.. math:: x ← x + σ_K^2\,∇\log π_K(x)

A run is not a chain that leaves a density invariant, but a way to draw: one step of the algorithm
is a whole run, from fresh noise to a draw, and steps are independent of each other. Its law comes
close to :math:`π_K` (or, denoised, to what :math:`π_K` is the noised density of) as steps get
shorter and more, provided that the first level mixes from noise and each level from the last.

With tethers the densities of a level are those given where it began,
:math:`π_k(x)\, e^{-\|x - x_0\|^2 / 2τ_k^2}`, from which a few steps draw: the run then goes back
through a diffusion whose levels differ by the variances :math:`τ_k^2`.

Reference: Song, Ermon, *Generative modeling by estimating gradients of the data distribution*,
2019; the last step, Jolicoeur-Martineau et al., *Adversarial score matching and improved sampling
for image generation*, 2021; tethers, Gao et al., *Learning energy-based models by diffusion
recovery likelihood*, 2021.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from numpyro_ebm._compat import (
    SamplingAlgorithm,
    build_sampling_algorithm,
    generate_gaussian_noise,
    overdamped_langevin,
)
from numpyro_ebm.samplers.langevin import ULAState
from numpyro_ebm.types import LogDensity

__all__ = ["AnnealedInfo", "AnnealedState", "as_top_level_api", "build_kernel", "init"]

AnnealedState = ULAState
"""State of one run: position, log-density and gradient at the last level."""


class AnnealedInfo(NamedTuple):
    """Information on one run.

    - **is_divergent** - whether the log-density at the end is not finite.
    """

    is_divergent: jax.Array


def init(position: Any, logdensity_fn: LogDensity, levels: jax.Array) -> AnnealedState:
    """State at a position, at the last level."""
    evaluate = jax.value_and_grad(logdensity_fn)
    return AnnealedState(position, *evaluate(position, levels[-1]))


def build_kernel(num_steps: int) -> Callable[..., tuple[AnnealedState, AnnealedInfo]]:
    """Build the kernel of one whole run.

    :param int num_steps: steps at each level.
    :return: ``(rng_key, state, logdensity_fn, levels, step_sizes, init_scale, denoise_variance,
        tethers) -> (state, info)``. Of the old state only the shape is used. ``logdensity_fn``
        takes a position and a level; ``levels`` and ``step_sizes`` have the shape (levels,);
        ``init_scale`` is the standard deviation of the noise at the start; ``denoise_variance`` is
        σ² of the last level, or ``None`` to leave out the step without noise; ``tethers`` are 1/τ²
        of the levels, or ``None``.
    """

    def kernel(
        rng_key,
        state,
        logdensity_fn,
        levels,
        step_sizes,
        init_scale,
        denoise_variance=None,
        tethers=None,
    ):
        key_start, key_run = jax.random.split(rng_key)
        evaluate = jax.value_and_grad(logdensity_fn)

        def at_level(start, inputs):
            level, step_size, key, tether = inputs

            def tethered(x):
                value, gradient = evaluate(x, level)
                if tether is None:
                    return value, gradient
                away = jax.tree.map(jnp.subtract, x, start)
                square = sum(jnp.sum(d**2) for d in jax.tree.leaves(away))
                return value - 0.5 * tether * square, jax.tree.map(
                    lambda g, d: g - tether * d, gradient, away
                )

            one_step: Any = overdamped_langevin(tethered)

            def step(run, key):
                return AnnealedState(*one_step(key, run, step_size)), None

            run = AnnealedState(start, *tethered(start))
            run, _ = jax.lax.scan(step, run, jax.random.split(key, num_steps))
            end = run if tether is None else AnnealedState(run.position, *evaluate(run[0], level))
            return end.position, (end.logdensity, end.logdensity_grad)

        noise = generate_gaussian_noise(key_start, state.position)
        start = jax.tree.map(lambda x: (init_scale * x).astype(x.dtype), noise)
        keys = jax.random.split(key_run, len(levels))
        position, ends = jax.lax.scan(at_level, start, (levels, step_sizes, keys, tethers))
        new = AnnealedState(position, *jax.tree.map(lambda x: x[-1], ends))
        if denoise_variance is not None:
            position = jax.tree.map(
                lambda x, g: x + denoise_variance * g, new.position, new.logdensity_grad
            )
            new = AnnealedState(position, *evaluate(position, levels[-1]))
        return new, AnnealedInfo(~jnp.isfinite(new.logdensity))

    return kernel


def as_top_level_api(
    logdensity_fn: LogDensity,
    levels: jax.Array,
    step_sizes: jax.Array,
    *,
    num_steps: int,
    init_scale: ArrayLike = 1.0,
    denoise_variance: ArrayLike | None = None,
    tethers: jax.Array | None = None,
) -> SamplingAlgorithm:
    """A BlackJAX ``SamplingAlgorithm`` whose ``step`` is one run, independent of the last.

    :param logdensity_fn: log π of a position and a level, up to a constant of the level.
    :param levels: array of shape (levels,), in the order in which they are visited.
    :param step_sizes: ε of each level, in squared units of the position.
    :param int num_steps: steps at each level.
    :param init_scale: standard deviation of the noise at the start.
    :param denoise_variance: σ² of the last level, for the step without noise at the end.
    :param tethers: 1/τ² of each level, (levels,), or ``None``.

    **Example**

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from numpyro_ebm.samplers.annealed import as_top_level_api
    >>> sigma = jnp.array([2.0, 1.0, 0.5])
    >>> noised = lambda x, s: -0.5 * jnp.sum(x**2) / (0.1 + s**2)
    >>> annealed = as_top_level_api(noised, sigma, 0.1 * sigma**2, num_steps=20, init_scale=2.0)
    >>> state, info = annealed.step(jax.random.key(0), annealed.init(jnp.zeros(2)))
    >>> bool(info.is_divergent)
    False
    """
    return build_sampling_algorithm(
        build_kernel(num_steps),
        lambda position, logdensity_fn: init(position, logdensity_fn, levels),
        logdensity_fn,
        kernel_args=(levels, step_sizes, init_scale, denoise_variance, tethers),
    )
