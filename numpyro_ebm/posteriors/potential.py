# SPDX-License-Identifier: Apache-2.0
r"""The potential of a generalised posterior, as a function of one vector of coordinates.

.. math:: U(θ) = βN\mathcal L(θ) - \log π(θ)

Losses are exact in their value and first derivatives; second derivatives are differences of
gradients.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import numpyro.distributions as dist
from jax.flatten_util import ravel_pytree
from numpyro.handlers import seed
from numpyro.infer.util import constrain_fn, potential_energy

from numpyro_ebm._compat import unconstrain_fn
from numpyro_ebm.errors import ModelError
from numpyro_ebm.keys import default_key
from numpyro_ebm.model.row_model import RowModel
from numpyro_ebm.types import Model, SiteValues

__all__ = ["Potential", "hessian_by_differences", "own_parameter_prior"]

OWN_PRIOR_SCALE = 10.0


def own_parameter_prior(value: jax.Array) -> dist.Distribution:
    """Prior of a parameter of the objective, such as the log-normalizer of NCE."""
    return dist.Normal(value, OWN_PRIOR_SCALE).to_event(jnp.ndim(value))


class Potential:
    """Loss and log-prior of a model, as functions of one vector of unconstrained coordinates.

    - **size** - number of coordinates.
    - **num_rows** - N.
    - **shapes** - shapes of the parameters by name, the objective's own among them.
    """

    def __init__(
        self,
        loss: Callable[..., jax.Array],
        prior: Model,
        row_model: RowModel,
        own: dict[str, tuple[Any, Any]],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ):
        self._loss, self._row_model = loss, row_model
        self._prior = seed(prior, default_key())
        self._own = {name: jnp.asarray(value) for name, (value, _) in own.items()}
        self._args, self._kwargs = args, kwargs
        self.num_rows = row_model.total_rows
        start = {
            name: jnp.zeros(dist.biject_to(fn.support).inverse_shape(fn.shape()))
            for name, fn in row_model.priors.items()
        }
        flat, self._unravel = ravel_pytree({**start, **self._own})
        self.start, self.size = flat, flat.size
        self.shapes = {name: tuple(fn.shape()) for name, fn in row_model.priors.items()}
        self.shapes |= {name: x.shape for name, x in self._own.items()}

    def params(self, x: jax.Array) -> SiteValues:
        """Constrained parameters by name."""
        z = self._unravel(x)
        own = {name: z.pop(name) for name in self._own}
        values = constrain_fn(self._prior, self._args, self._kwargs, z)
        return {**{name: values[name] for name in self._row_model.priors}, **own}

    def values(self, x: jax.Array) -> SiteValues:
        """Constrained parameters, and deterministic sites, of many positions (draws, size)."""
        z = jax.vmap(self._unravel)(x)
        own = {name: z.pop(name) for name in self._own}
        values = constrain_fn(
            self._prior, self._args, self._kwargs, z, return_deterministic=True, batch_ndims=1
        )
        return {**values, **own}

    def coordinates(self, params: SiteValues) -> jax.Array:
        """Undo :meth:`params`."""
        own = {name: params[name] for name in self._own}
        constrained = {name: params[name] for name in self._row_model.priors}
        z = unconstrain_fn(self._prior, self._args, self._kwargs, constrained)
        return ravel_pytree({**z, **own})[0].astype(self.start.dtype)

    def log_prior(self, x: jax.Array) -> jax.Array:
        """Log-density of the prior in unconstrained coordinates."""
        z = self._unravel(x)
        own = {name: z.pop(name) for name in self._own}
        total: Any = -potential_energy(self._prior, self._args, self._kwargs, z)
        return total + sum(
            own_parameter_prior(self._own[name]).log_prob(value) for name, value in own.items()
        )

    def loss(self, x: jax.Array, rng_key: jax.Array, weights: jax.Array | None = None) -> jax.Array:
        """The objective, a mean over rows; rows count as often as their ``weights``, (rows,)."""
        params = self.params(x)
        return self._loss(rng_key, params, self._args, self._kwargs, weights=weights)

    def loss_at(self, x: jax.Array, rng_key: jax.Array, values: SiteValues) -> jax.Array:
        """The objective where the visible sites have other values."""
        return self._loss(rng_key, self.params(x), self._args, self._kwargs, values=values)

    def check_all_rows(self) -> None:
        """Raise if the data plate subsamples its rows."""
        row_model = self._row_model
        if row_model.num_rows != row_model.total_rows:
            raise ModelError(
                f"generalized: a calibration needs all rows, and the plate '{row_model.plate}' has "
                "a `subsample_size`. Calibrate a model without it, and pass the number on as "
                "`learning_rate`."
            )


def hessian_by_differences(
    gradient: Callable[..., Any], x: jax.Array | np.ndarray, step: npt.ArrayLike | None = None
) -> np.ndarray:
    """Jacobian of a gradient by central differences, made symmetric.

    :param gradient: maps (D,) to (D,).
    :param x: where, (D,).
    :param step: of the differences; balances rounding and curvature if ``None``.
    :return: array (D, D).
    """
    x = jnp.asarray(x)
    balance = float(jnp.finfo(x.dtype).eps) ** (1 / 3) * (1 + np.abs(np.asarray(x)))
    step = np.broadcast_to(balance if step is None else step, x.shape)
    steps = np.diag(step).astype(x.dtype)
    columns = [
        np.asarray(gradient(x + e), float) - np.asarray(gradient(x - e), float) for e in steps
    ]
    hessian = np.stack(columns) / (2 * np.diag(steps)[:, None].astype(float))
    return 0.5 * (hessian + hessian.T)
