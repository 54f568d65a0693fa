# SPDX-License-Identifier: Apache-2.0
"""Where the mass of a fixed model lies, in all its real coordinates, and whether there is any."""

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.util import not_jax_tracer

from numpyro_ebm.errors import ModelError
from numpyro_ebm.log_normalizers.explore import FAR, explore
from numpyro_ebm.log_normalizers.path import Path, flatten, unflatten

__all__ = ["diverges", "explored", "falling"]

CHAINS = 512  # that look for the mass of the model


def explored(rng_key, target, real, blocks, *, is_diagonal=False):
    """Cloud of the model's real coordinates; raises where it runs away."""
    key_start, key_run = jax.random.split(rng_key)
    chains = max(64, -(-CHAINS // target.num_problems))
    num = chains * target.num_problems
    path = Path(target.log_densities, None, real, blocks, None, target.num_problems)

    @jax.jit
    def run():
        position = target.start(key_start, num)
        found = explore(key_run, path, position, target.real, is_diagonal=is_diagonal)
        return found, target.are_sane(found.position)

    found, sane = run()
    if not_jax_tracer(sane):
        _check_exploration(target, found, np.asarray(sane))
    return found


def _check_exploration(target, found, sane):
    names = target.coordinate_names()
    growth = np.asarray(found.growth)
    away = ~np.isfinite(growth) | (growth > FAR)
    lost = np.mean(sane) < 0.5
    if not np.any(found.is_there) and not (np.any(away) or lost):
        raise ModelError(
            f"log_normalizer: the energy is not finite anywhere that chains of {sorted(set(names))}"
            " started. Pass data to the model, for the chains to start at."
        )
    if np.any(away) or lost:
        at = np.any(away, 0)
        if np.all(at):  # no draw of a Gaussian, perhaps because of one of its coordinates
            raise diverges(falling(target), "the energy does not rise in them")
        worst = [name for name, is_away in zip(names, at, strict=True) if is_away] or names
        raise diverges(worst, "chains that follow the energy run away without end")


def falling(target):
    """Real sites in which the energy does not bend upwards at the origin; all of them if none."""
    like = target.placeholder(target.num_problems)
    zero = flatten(like, target.real)

    @jax.jit
    def curvatures():
        def total(x):
            return jnp.sum(target.log_density({**like, **unflatten(x, like, target.real)}))

        _, times_hessian = jax.linearize(jax.grad(total), zero)
        along = lambda axis: times_hessian(jnp.broadcast_to(axis, zero.shape)) @ axis  # noqa: E731
        return jax.vmap(along, 0, 1)(jnp.eye(zero.shape[1], dtype=zero.dtype))

    at = np.any(~(np.asarray(curvatures()) < 0), 0)
    names = target.coordinate_names()
    return [name for name, is_falling in zip(names, at, strict=True) if is_falling] or names


def diverges(names, why):
    """The error that an integral over the named sites diverges."""
    names = ", ".join(f"'{name}'" for name in sorted(set(names)))
    return ModelError(
        f"log_normalizer: the integral of exp(-E) over the site(s) {names} diverges, or cannot be "
        f"told from one that does: {why}. Let the energy grow in them faster than their volume "
        "does, bound their support, or give them a proper base measure, `dist.Normal(...)` "
        "instead of `Lebesgue()`."
    )
