# SPDX-License-Identifier: Apache-2.0
r"""log Z(θ) as a function of the parameters, interpolated from estimates at a design of them.

.. math:: \widehat{\log Z}(θ) ≈ \log Z(θ), \qquad \text{from } \log \hat Z(θ_k) ± \mathrm{mcse}_k

For models whose Z has to be annealed, at too high a price for every step of a sampler: pay it at a
few dozen parameters beforehand.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.flatten_util import ravel_pytree
from numpyro.distributions import biject_to
from numpyro.infer import Predictive

from numpyro_ebm._compat import find_stack_level
from numpyro_ebm.errors import ModelError, NormalizerDisagreementWarning
from numpyro_ebm.language.fixed import fixed
from numpyro_ebm.log_normalizers import log_normalizer
from numpyro_ebm.log_normalizers.methods import MethodName
from numpyro_ebm.model.priors import prior_part, read_with_priors
from numpyro_ebm.model.row_analysis import check_rows_alike
from numpyro_ebm.posteriors.emulator import Emulator, fit_emulator
from numpyro_ebm.printed import brief
from numpyro_ebm.signatures import explaining
from numpyro_ebm.types import Model, Params

__all__ = ["EmulatedLogNormalizer", "emulate_log_normalizer"]

MOST_SURPRISE = 2.0
"""Warn above this root mean square of the left-out residuals, in their standard errors."""


class EmulatedLogNormalizer(NamedTuple):
    """log Z as a function of the parameters: what ``normalized(model, log_normalizer)`` takes.

    - **transforms** - from unconstrained coordinates, by the name of the parameter.
    - **emulator** - :class:`~numpyro_ebm.posteriors.emulator.Emulator`.
    - **design** - parameters, values and errors that it was fitted to.
    """

    transforms: dict[str, Any]
    emulator: Emulator
    design: dict[str, Any]

    __repr__ = brief

    def __call__(self, params: Params) -> jax.Array:
        """log Z at a dict of parameters, a scalar."""
        return self.emulator.predict(self._flat(params))[0]

    def mcse(self, params: Params) -> jax.Array:
        """Its standard error: of the estimates, and of interpolating between them."""
        return self.emulator.predict(self._flat(params))[1]

    def _flat(self, params):
        z = {name: transform.inv(params[name]) for name, transform in self.transforms.items()}
        return ravel_pytree(z)[0]


@explaining
def emulate_log_normalizer(
    rng_key: jax.Array,
    model: Model,
    *args: Any,
    design: int | Mapping[str, npt.ArrayLike] = 64,
    method: MethodName | Sequence[MethodName] | None = None,
    options: dict[str, Any] | None = None,
    **kwargs: Any,
) -> EmulatedLogNormalizer:
    r"""Interpolate log Z(θ) from estimates at a design of parameters.

    A Gaussian process on top of a polynomial, in unconstrained coordinates, weighs every estimate
    by its error; between and beyond the design its own standard error grows. Of a design of few
    points it is a rough one: over an Ising model with 16, errors are 1.6 times as large as claimed
    inside, and 2.8 times half a spread of the design beyond (root mean squares).
    ``normalized(model, emulated)`` evaluates it once for each step of a sampler, and records the
    standard error of the log-likelihood at every draw as ``log_normalizer_error``, in nats: where
    that is no small part of one, the posterior is not to be trusted.

    :param rng_key: random key.
    :param model: a NumPyro model with energy statements and priors on its parameters.
    :param args: arguments of the model; one row of data is enough.
    :param design: how many draws of the prior, or a dict of parameter values with the draws leading
        (of a first run, say: where the posterior is, the design should be dense).
    :param method: of :func:`~numpyro_ebm.log_normalizer`.
    :param dict options: further options of :func:`~numpyro_ebm.log_normalizer`.
    :param kwargs: keyword arguments of the model.
    :return: :class:`EmulatedLogNormalizer`, a function of the dict of parameters.
    :raises ModelError: if no parameter has a prior, the design is too small for a quadratic or
        misses a parameter, every row has a log Z of its own, or an estimate is not finite.

    Warns :class:`~numpyro_ebm.errors.NormalizerDisagreementWarning` if estimates lie further from
    what the others predict than the errors allow: the design is too coarse, or errors too small.

    **Example**

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import numpyro
    >>> import numpyro.distributions as dist
    >>> import numpyro_ebm as ebm
    >>> def gaussian(data=None):
    ...     precision = numpyro.sample("precision", dist.LogNormal(0.0, 0.5))
    ...     with numpyro.plate("data", 1 if data is None else len(data)):
    ...         v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
    ...         ebm.energy("E", 0.5 * precision * v**2)
    >>> log_z = ebm.emulate_log_normalizer(jax.random.key(0), gaussian, design=20)
    >>> gap = log_z({"precision": 1.3}) - 0.5 * jnp.log(2 * jnp.pi / 1.3)
    >>> bool(abs(gap) < 0.001)
    True
    """
    key_design, key_run = jax.random.split(rng_key)
    row_model = read_with_priors(model, args, kwargs, "emulate_log_normalizer")
    check_rows_alike(
        row_model,
        "emulate_log_normalizer: log Z is to be one function of the parameters",
        'Use `normalized(model, "enumerate")` or `"quadrature"`, or `Exchange`.',
    )
    priors = row_model.priors
    if isinstance(design, int):
        prior = prior_part(model, row_model.plate)
        given = Predictive(prior, num_samples=design)(key_design, *args, **kwargs)
    else:
        given = design
    missing = sorted(set(priors) - set(given))
    if missing:
        raise ModelError(f"emulate_log_normalizer: `design` has no values for {missing}.")
    draws = {name: jnp.asarray(given[name]) for name in sorted(priors)}
    transforms = {name: biject_to(priors[name].support) for name in draws}
    points = jax.vmap(
        lambda params: ravel_pytree({k: transforms[k].inv(x) for k, x in params.items()})[0]
    )(draws)
    _check_size(*points.shape)

    def estimate(key, params):
        return log_normalizer(
            key, fixed(model, params), *args, method=method, **(options or {}), **kwargs
        )

    values, errors = _estimates(key_run, estimate, draws)
    emulator = fit_emulator(points, values, errors)
    surprise = float(jnp.sqrt(jnp.mean(emulator.left_out**2)))
    if surprise > MOST_SURPRISE:
        warnings.warn(
            NormalizerDisagreementWarning(
                f"emulate_log_normalizer: estimates are off by {surprise:.1f} standard errors "
                "(root mean square) from what the rest of the design predicts. Use a denser "
                "design, one that is concentrated where the posterior is, or more particles."
            ),
            stacklevel=find_stack_level(),
        )
    return EmulatedLogNormalizer(
        transforms, emulator, {"params": draws, "log_normalizer": values, "mcse": errors}
    )


def _check_size(num, size):
    """Raise unless there are more points than coefficients of a quadratic."""
    needed = (size + 1) * (size + 2) // 2
    if num <= needed:
        raise ModelError(
            f"emulate_log_normalizer: a design of {num} points, and a quadratic in {size} "
            f"coordinates alone has {needed} coefficients. Ask for several times as many."
        )


def _estimates(rng_key, estimate, design):
    """log Z and its standard error at every point of a design, both finite."""
    num = len(next(iter(design.values())))

    @jax.jit
    def at_design(keys, design):
        def one(key_and_params):
            found = estimate(*key_and_params)
            return found.value, jnp.asarray(found.mcse, found.value.dtype)

        return jax.lax.map(one, (keys, design))

    values, errors = map(np.asarray, at_design(jax.random.split(rng_key, num), design))
    if not (np.all(np.isfinite(values)) and np.all(np.isfinite(errors))):
        bad = int(np.argmin(np.isfinite(values + errors)))
        where = {name: np.asarray(x[bad]).tolist() for name, x in design.items()}
        raise ModelError(
            f"emulate_log_normalizer: log Z is {values[bad]} ± {errors[bad]} at {where}. Where the "
            "prior allows parameters without a finite log Z, give a `design` without them."
        )
    return values, errors
