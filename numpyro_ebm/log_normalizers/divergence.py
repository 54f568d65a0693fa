# SPDX-License-Identifier: Apache-2.0
"""The error that an integral over a fixed model diverges, and which sites to name in it."""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_ebm.errors import ModelError
from numpyro_ebm.log_normalizers.integrand import Integrand
from numpyro_ebm.samplers.positions import flatten_sites

__all__ = ["divergence_error", "falling_sites"]


def divergence_error(names: Iterable[str], why: str) -> ModelError:
    """The error that an integral over the named sites diverges.

    :param names: names of the sites, in any number.
    :param str why: what was observed.
    :return: a :class:`~numpyro_ebm.errors.ModelError` to raise.
    """
    names = ", ".join(f"'{name}'" for name in sorted(set(names)))
    return ModelError(
        f"log_normalizer: the integral of exp(-E) over the site(s) {names} diverges, or cannot be "
        f"told from one that does: {why}. Let the energy grow in them faster than their volume "
        "does, bound their support, or give them a proper base measure, `dist.Normal(...)` "
        "instead of `Lebesgue()`."
    )


def falling_sites(integrand: Integrand) -> list[str]:
    """Real sites in which the energy has no positive curvature at the origin; all if there is none.

    :param Integrand integrand: the density, with concrete values.
    :return: list of names.
    """
    like = integrand.placeholder(integrand.num_problems)
    zero, unflatten = flatten_sites(like, integrand.real)

    @jax.jit
    def curvatures():
        def total(x):
            return jnp.sum(integrand.log_density({**like, **unflatten(x)}))

        _, times_hessian = jax.linearize(jax.grad(total), zero)
        along = lambda axis: times_hessian(jnp.broadcast_to(axis, zero.shape)) @ axis  # noqa: E731
        return jax.vmap(along, 0, 1)(jnp.eye(zero.shape[1], dtype=zero.dtype))

    at = np.any(~(np.asarray(curvatures()) < 0), 0)
    names = integrand.coordinate_names()
    return [name for name, is_falling in zip(names, at, strict=True) if is_falling] or names
