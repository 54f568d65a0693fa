# SPDX-License-Identifier: Apache-2.0
r"""The log-likelihood of a network's energy between two bounds, or not at all.

Annealing from a Gaussian to the model gives an estimate of Z without bias, so that its logarithm is
too small in expectation; from draws of the model back to the Gaussian it gives one of 1/Z, so that
log Z is too large (bidirectional Monte Carlo):

.. math:: E \log \hat Z_{\rightarrow} \le \log Z \le -E \log \widehat{Z^{-1}}_{\leftarrow}

A single estimate looks sure of itself where it has missed a mode. Two that come from both sides and
meet do not both miss it by chance; where they stay apart log Z is not known.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logsumexp

from numpyro_ebm._compat import not_jax_tracer
from numpyro_ebm.diagnostics.reading import pick_marginal, read_rows
from numpyro_ebm.errors import ModelError, check_integer, check_positive
from numpyro_ebm.inputs import as_arrays
from numpyro_ebm.keys import default_key
from numpyro_ebm.model.row_analysis import check_rows_alike
from numpyro_ebm.model.row_model import RowModel
from numpyro_ebm.printed import brief
from numpyro_ebm.program.compilation import run_compiled
from numpyro_ebm.signatures import explaining
from numpyro_ebm.types import Model

__all__ = ["LikelihoodBounds", "log_likelihood_bounds"]


class LikelihoodBounds(NamedTuple):
    """What :func:`log_likelihood_bounds` found, in nats a row.

    - **lower, upper** - of the mean log-likelihood, in expectation, by the two estimates of log Z.
    - **standard_error** - of either, over rows, with the larger of the two errors of log Z.
    - **log_normalizer** - log Z from the Gaussian and from the draws, (2,).
    - **log_normalizer_error** - their standard errors, (2,).
    - **by_row** - log-likelihood of every row, with the mean of both.
    """

    lower: jax.Array
    upper: jax.Array
    standard_error: jax.Array
    log_normalizer: jax.Array
    log_normalizer_error: jax.Array
    by_row: jax.Array

    __repr__ = brief


@explaining
def log_likelihood_bounds(
    rng_key: jax.Array,
    model: Model,
    data: Any,
    draws: Any,
    *args: Any,
    num_temperatures: int = 500,
    tolerance: float = 1.0,
    **kwargs: Any,
) -> LikelihoodBounds:
    r"""Bounds of the mean log-likelihood of rows, or a refusal to give any.

    :param rng_key: random key.
    :param model: a model with fixed parameters, ``fixed(model, params)``, of real visible sites;
        its latent sites are summed out exactly.
    :param data: rows, the model's first argument, which it has not seen.
    :param draws: draws of the visible sites from the model, (draws, ...): from chains that have
        mixed, such as persistent ones of a fit that go on at its last parameters. Half of them, and
        the data, fit the Gaussian, from the other half annealing starts.
    :param args: further arguments of the model.
    :param int num_temperatures: steps of MALA in either direction.
    :param tolerance: how far apart the two estimates of log Z may be, and twice how large their
        errors, in nats; ``inf`` returns whatever comes.
    :param kwargs: keyword arguments of the model.
    :return: :class:`LikelihoodBounds`.
    :raises ModelError: if the estimates are further apart, in either direction, or known no better:
        the draws are not those of the model, a mode was missed, or the annealing was too quick. If
        rows do not share log Z, a visible site is discrete, or there are no more draws than four
        times the coordinates.

    It cannot see what both miss: a mode in which there are neither draws nor data and which
    annealing does not find.

    Reference: Neal, *Annealed importance sampling*, 2001; Grosse, Ghahramani, Adams, *Sandwiching
    the marginal likelihood using bidirectional Monte Carlo*, 2015; on the decoders of deep models,
    Wu, Burda, Salakhutdinov, Grosse, ICLR 2017.

    **Example**

    >>> import jax, jax.numpy as jnp, numpyro
    >>> import numpyro_ebm as ebm
    >>> def model(data):
    ...     with numpyro.plate("data", len(data)):
    ...         v = numpyro.sample("v", ebm.Lebesgue(event_shape=(2,)), obs=data)
    ...         ebm.energy("E", 0.5 * jnp.sum(v**2, -1))
    >>> data, draws = jax.random.normal(jax.random.key(0), (2, 200, 2))
    >>> found = ebm.diagnostics.log_likelihood_bounds(
    ...     jax.random.key(1), ebm.fixed(model, {}), data, draws, num_temperatures=50
    ... )
    >>> bool(jnp.all(jnp.abs(found.log_normalizer - jnp.log(2 * jnp.pi)) < 0.1))
    True
    """
    check_integer("log_likelihood_bounds", minimum=2, num_temperatures=num_temperatures)
    if tolerance != math.inf:
        check_positive("log_likelihood_bounds", tolerance=tolerance)
    data_model, of_rows = _density(model, data, args, kwargs)
    draws = _as_rows(draws, data)
    fitted = jax.tree.map(lambda x: x[::2], draws)
    begun = jax.tree.map(lambda x: x[1 : 2 * (len(x) // 2) : 2], draws)
    fitted_model, _ = _density(model, fitted, args, kwargs)
    row_model, log_density = _density(model, begun, args, kwargs)

    def run(rng_key):
        points = [m.flatten(m.unconstrain_visible()) for m in (fitted_model, data_model)]
        points = jnp.concatenate(points)
        start = row_model.flatten(row_model.unconstrain_visible())
        estimates = _both_ways(rng_key, log_density, points, start, num_temperatures)
        point = data_model.unconstrain_visible()
        _, log_det = data_model.constrain(point)
        rows = of_rows(data_model.flatten(point)) - log_det
        return jnp.broadcast_to(rows, (data_model.num_rows,)), *estimates

    num, size = row_model.num_rows, sum(row_model.sizes.values())
    if num <= 2 * size:
        raise ModelError(
            f"log_likelihood_bounds: {2 * num} draws are too few to fit a Gaussian of {size} "
            f"coordinates with a half of them; pass {4 * size + 4} or more."
        )
    rows, log_z, error = run_compiled(run, rng_key)
    if not_jax_tracer(log_z):
        _check_that_they_meet(np.asarray(log_z), np.asarray(error), tolerance)
    upper, lower = jnp.mean(rows) - log_z
    spread = jnp.var(rows, ddof=1) / len(rows)
    total = jnp.sqrt(spread + jnp.max(error) ** 2)
    return LikelihoodBounds(lower, upper, total, log_z, error, rows - jnp.mean(log_z))


def _as_rows(draws, data):
    """Draws as so many rows of the data, without axes of chains."""
    like, draws = as_arrays((data, draws))[0]
    like, structure = jax.tree.flatten(like)
    draws, found = jax.tree.flatten(draws)
    shapes = [jnp.shape(x)[1:] for x in like]
    if found != structure or any(
        jnp.shape(d)[-len(shape) or jnp.ndim(d) :] != shape
        for d, shape in zip(draws, shapes, strict=True)
    ):
        raise ModelError(
            "log_likelihood_bounds: `draws` are rows as those of the data, which have the shape(s) "
            f"{shapes}; got arrays of {[jnp.shape(x) for x in draws]}."
        )
    rows = [jnp.reshape(d, (-1, *shape)) for d, shape in zip(draws, shapes, strict=True)]
    return jax.tree.unflatten(structure, rows)


def _density(model, data, args, kwargs) -> tuple[RowModel, Callable[[jax.Array], jax.Array]]:
    """The model at these rows, and log p̃ of as many vectors of unconstrained coordinates."""
    row_model = read_rows("log_likelihood_bounds", model, data, args, kwargs)
    for name, site in row_model.visible.items():
        if site.is_discrete:
            raise ModelError(
                f"log_likelihood_bounds moves real sites, and '{name}' is discrete. Leave it out, "
                "so that it is summed out, or use `numpyro_ebm.log_normalizer`."
            )
    check_rows_alike(
        row_model,
        "log_likelihood_bounds knows one log Z for all rows",
        "Use `numpyro_ebm.log_likelihood`, which knows one for each.",
    )
    marginal, reader, params = pick_marginal("log_likelihood_bounds", row_model, None, None, None)
    if marginal.value != "exact":
        raise ModelError("log_likelihood_bounds: the latent sites have no exact sum.")

    def log_density(flat):
        point = row_model.unflatten(flat)
        estimate = marginal.bind(default_key(), row_model, reader, params, point, order=1)
        return estimate.log_density(params, point)

    return row_model, log_density


def _both_ways(rng_key, log_density, points, start, num_temperatures):
    """log Z, (2,), from the Gaussian of some draws to the model and from others back, and errors.

    Coordinates z are those in which the Gaussian is standard.
    """
    size, dtype = points.shape[1], points.dtype
    mean, cov = jnp.mean(points, 0), jnp.atleast_2d(jnp.cov(points, rowvar=False))
    root = jnp.linalg.cholesky(cov + 1e-3 * jnp.trace(cov) / size * jnp.eye(size, dtype=dtype))
    log_volume = jnp.sum(jnp.log(jnp.diag(root)))

    def gaussian(z):
        return -0.5 * jnp.sum(z**2, -1) - 0.5 * size * jnp.log(2 * jnp.pi)

    def log_ratio(z):
        return log_density(mean + z @ root.T) + log_volume - gaussian(z)

    ramp = jax.nn.sigmoid(4.0 * jnp.linspace(-1.0, 1.0, num_temperatures + 1, dtype=dtype))
    betas = (ramp - ramp[0]) / (ramp[-1] - ramp[0])
    key_pilot, key_draw, key_forth, key_back = jax.random.split(rng_key, 4)
    standard = jax.random.normal(key_draw, (2, *start.shape), dtype)

    def move(rng_key, z, beta, step_size):
        return _langevin_move(rng_key, lambda z: gaussian(z) + beta * log_ratio(z), z, step_size)

    def pilot(carry, x):
        (z, log_step), (key, beta) = carry, x
        z, accepted = move(key, z, beta, jnp.exp(log_step))
        log_step = log_step + 0.5 * (accepted - 0.574)
        return (z, log_step), log_step

    def forth(carry, x):
        (z, weight), (key, old, beta, step_size) = carry, x
        weight = weight + (beta - old) * log_ratio(z)
        return (move(key, z, beta, step_size)[0], weight), None

    def back(carry, x):
        (z, weight), (key, old, beta, step_size) = carry, x
        z = move(key, z, beta, step_size)[0]
        return (z, weight - (beta - old) * log_ratio(z)), None

    def keys(rng_key):
        return jax.random.split(rng_key, num_temperatures)

    first = jnp.asarray(jnp.log(1.0 / size ** (1 / 3)), dtype)
    _, log_steps = jax.lax.scan(pilot, (standard[0], first), (keys(key_pilot), betas[1:]))
    steps = betas[:-1], betas[1:], jnp.exp(log_steps)
    nothing = jnp.zeros(len(start), dtype)
    whitened = jax.scipy.linalg.solve_triangular(root, (start - mean).T, lower=True).T
    (_, up), _ = jax.lax.scan(forth, (standard[1], nothing), (keys(key_forth), *steps))
    (_, down), _ = jax.lax.scan(back, (whitened, nothing), (keys(key_back), *steps), reverse=True)
    (z_up, error_up), (z_down, error_down) = _log_mean(up), _log_mean(down)
    return jnp.stack([z_up, -z_down]), jnp.stack([error_up, error_down])


def _langevin_move(rng_key, log_density, z, step_size):
    """A step of every particle, and how many of the steps were accepted in the mean."""
    key_noise, key_accept = jax.random.split(rng_key)

    def evaluate(z):
        value, pull = jax.vjp(log_density, z)
        return value, pull(jnp.ones_like(value))[0]

    def log_proposal(new, old, gradient):
        return -jnp.sum((new - old - step_size * gradient) ** 2, -1) / (4 * step_size)

    value, gradient = evaluate(z)
    noise = jax.random.normal(key_noise, z.shape, z.dtype)
    new = z + step_size * gradient + jnp.sqrt(2 * step_size) * noise
    new_value, new_gradient = evaluate(new)
    log_accept = new_value - value + log_proposal(z, new, new_gradient)
    log_accept = log_accept - log_proposal(new, z, gradient)
    probability = jnp.exp(jnp.minimum(log_accept, 0.0))  # of what is not finite, nothing
    accept = jax.random.uniform(key_accept, value.shape, z.dtype) < probability
    return jnp.where(accept[:, None], new, z), jnp.mean(jnp.where(accept, 1.0, 0.0))


def _log_mean(log_weights):
    """The logarithm of the mean weight, and its standard error by the delta method."""
    value = logsumexp(log_weights) - jnp.log(len(log_weights))
    error = jnp.std(jnp.exp(log_weights - value), ddof=1) / np.sqrt(len(log_weights))
    return value, error


def _check_that_they_meet(log_z, error, tolerance):
    gap = log_z[1] - log_z[0]
    known = np.all(np.isfinite(log_z)) and 2 * np.max(error) <= tolerance
    if known and abs(gap) <= tolerance:
        return
    raise ModelError(
        "log_likelihood_bounds: log Z is not known well enough for a log-likelihood. It is "
        f"{log_z[0]:.2f} ± {error[0]:.2f} from a Gaussian to the model and {log_z[1]:.2f} ± "
        f"{error[1]:.2f} from the draws back, where {tolerance:g} nats were asked for. Raise "
        "`num_temperatures`, pass draws of longer chains, or compare models by "
        "`numpyro_ebm.diagnostics.denoising_loss`, which needs no log Z."
    )
