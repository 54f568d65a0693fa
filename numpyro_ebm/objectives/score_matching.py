# SPDX-License-Identifier: Apache-2.0
r"""Score matching, with the exact trace of the Hessian or with random slices.

Both minimise the Fisher divergence between data and model without a sampler and without log Z. The
exact form costs one second derivative for every dimension of v; the sliced form one for every
slice. Their gradients take three derivatives of log p̃, hence three cumulants under ``VaGES``.
"""

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from numpyro_ebm.errors import check_integer
from numpyro_ebm.marginals.base import Marginal
from numpyro_ebm.objectives.base import Objective, Problem
from numpyro_ebm.objectives.directions import draw_like, each, half_square, second_derivative
from numpyro_ebm.program.derivatives import constant_once, half_value
from numpyro_ebm.types import Params

__all__ = ["ScoreMatching", "SlicedScoreMatching"]

MOST_VALUES = 2**22
"""Values of directions that :class:`ScoreMatching` goes along together."""


class ScoreMatching(Objective):
    r"""Score matching (SM) with the exact trace.

    .. math:: \mathcal L(θ) = E\big[\tfrac12 \|s(v; θ)\|^2 + \operatorname{tr} ∇_v s(v; θ)\big]

    It costs a second derivative for each of the D coordinates of a row. Where D² times the rows is
    more than memory holds they are taken in blocks; from hundreds of coordinates on
    :class:`~numpyro_ebm.SlicedScoreMatching` is the cheaper one, of the same minimiser.

    :param marginal: how latent sites are integrated out; ``VaGES`` needs three particles.
    :raises ModelError: when used, if a visible site is discrete.

    Reference: Hyvärinen, *Estimation of non-normalized statistical models by score matching*, 2005.

    **Example**

    >>> import jax.numpy as jnp
    >>> import jax, numpyro
    >>> import numpyro_ebm as ebm
    >>> def gaussian(data):
    ...     precision = numpyro.param("precision", 1.0)
    ...     with numpyro.plate("data", len(data)):
    ...         v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
    ...         ebm.energy("E", 0.5 * precision * v**2)
    >>> data = jnp.array([-1.0, 3.0])  # ½ θ² E[v²] - θ with E[v²] = 5
    >>> float(ebm.ScoreMatching().loss(jax.random.key(0), {"precision": 2.0}, gaussian, None, data))
    8.0
    """

    order = 3
    is_scoring_rule = True

    def energy_loss(self, rng_key: jax.Array, params: Params, problem: Problem) -> jax.Array:
        estimate = self.estimate(rng_key, params, problem)
        trace = _sum_over_coordinates(
            lambda e: second_derivative(params, estimate, problem, e), problem
        )
        return problem.row_model.mean(half_square(params, estimate, problem) + trace)


class SlicedScoreMatching(Objective):
    r"""Sliced score matching (SSM).

    .. math:: \mathcal L(θ) = E\big[\tfrac12 \|s(v; θ)\|^2 + e^\top ∇_v s(v; θ)\, e\big]

    over Rademacher slices e, which have :math:`E[ee^\top] = I`. Without variance reduction the
    first term is :math:`\tfrac12 (e^\top s)^2`.

    :param int num_slices: slices for each row.
    :param marginal: how latent sites are integrated out; ``VaGES`` needs three particles.
    :param bool variance_reduction: whether to use ½‖s‖², the expectation of the sliced square.
    :raises ModelError: if ``num_slices`` is not a positive integer; when used, if a visible site is
        discrete.

    Reference: Song, Garg, Shi, Ermon, *Sliced score matching*, UAI 2019.

    **Example**

    >>> import numpyro_ebm as ebm
    >>> ebm.SlicedScoreMatching(num_slices=2, variance_reduction=False)
    SlicedScoreMatching(num_slices=2, variance_reduction=False, marginal=None)
    """

    order = 3
    is_scoring_rule = True

    def __init__(
        self,
        num_slices: int = 1,
        marginal: Marginal | None = None,
        *,
        variance_reduction: bool = True,
    ):
        check_integer("SlicedScoreMatching", num_slices=num_slices)
        self.num_slices = num_slices
        self.variance_reduction = variance_reduction
        super().__init__(marginal)

    def energy_loss(self, rng_key: jax.Array, params: Params, problem: Problem) -> jax.Array:
        key_slices, key_marginal = jax.random.split(rng_key)
        estimate = self.estimate(key_marginal, params, problem)
        slices = draw_like(
            jax.random.rademacher, key_slices, problem.unconstrained, self.num_slices
        )
        curvature = each(lambda e: second_derivative(params, estimate, problem, e), slices)
        if self.variance_reduction:
            square = half_square(params, estimate, problem)
        else:
            square = each(lambda e: _sliced_half_square(params, estimate, problem, e), slices)
            square = jnp.mean(square, 0)
        return problem.row_model.mean(square + jnp.mean(curvature, 0))


def _sliced_half_square(params, estimate, problem, direction):
    """Unbiased value and gradient of ½ (e·s)² for every row."""
    score = estimate.score(problem.unconstrained)
    along_a = problem.row_model.row_dot(score, direction)
    along_b = jax.jvp(
        lambda u: estimate.log_density(params, u), (problem.unconstrained,), (direction,)
    )[1]
    return half_value(constant_once(along_a) * along_b)


def _sum_over_coordinates(along, problem):
    """The sum of ``along(direction)``, of shape (rows,), over the coordinates of a row.

    As many coordinates as memory allows go together, and nothing is kept of a block but its sum:
    the backward pass evaluates it once more.
    """
    row_model, point = problem.row_model, problem.unconstrained
    one_row = {k: jnp.take(x, 0, axis=row_model.row_axis(k, x)) for k, x in point.items()}
    flat, unravel = ravel_pytree(one_row)

    def direction(e):
        """A direction of a row, the same in all rows."""
        return {
            k: jnp.broadcast_to(jnp.expand_dims(x, row_model.row_axis(k, point[k])), point[k].shape)
            for k, x in unravel(e).items()
        }

    num_values = flat.size * row_model.num_rows  # of a direction of all rows
    together = max(1, MOST_VALUES // max(num_values, 1))
    if flat.size <= together:
        directions = jax.vmap(direction)(jnp.eye(flat.size, dtype=flat.dtype))
        return jnp.sum(jax.vmap(along)(directions), 0)

    @jax.checkpoint
    def block(total, coordinates):
        basis = jax.nn.one_hot(coordinates, flat.size, dtype=flat.dtype)  # beyond the last: zero
        return total + jnp.sum(jax.vmap(along)(jax.vmap(direction)(basis)), 0), None

    blocks = jnp.arange(-(-flat.size // together) * together).reshape(-1, together)
    return jax.lax.scan(block, jnp.zeros(row_model.num_rows, flat.dtype), blocks)[0]
