# SPDX-License-Identifier: Apache-2.0
r"""Fisher divergence between data and model, by a Stein critic.

.. math:: D_F = \tfrac12 E_{\text{data}} \|s(v; θ) - s_{\text{data}}(v)\|^2
    = \max_f\, E_{\text{data}}\big[s(v; θ)·f(v) + \operatorname{tr} ∇_v f(v) - \tfrac12 \|f(v)\|^2
    \big]

The critic f is a network of its own, and its optimum is :math:`s - s_{\text{data}}`; the trace is
taken along random signs (Hutchinson). On rows that the critic has not seen the right-hand side is,
in the mean, a lower bound of the divergence, whatever f is. With ``VaGES`` the score of a model
with latents is VaES.

A plain critic has to learn the model's score, which may be rugged, besides the data's. By default f
is :math:`a\,s(v; θ) + g(v)` with a learned number a: at a = 1 only the data's score is left to the
network g, and the trace of the model's score is computed instead of learned.

Reference: Hu et al., *Stein neural sampler*, 2018; Grathwohl et al., *Learning the Stein
discrepancy*, ICML 2020; with latents, Bao et al., ICML 2021.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpyro
from numpyro.distributions import constraints
from numpyro.handlers import block, seed, substitute, trace

from numpyro_ebm.errors import ModelError, check_integer
from numpyro_ebm.keys import default_key
from numpyro_ebm.language.sites import param_sites
from numpyro_ebm.marginals.base import Marginal
from numpyro_ebm.model.row_analysis import check_rows_alike
from numpyro_ebm.model.row_model import RowModel
from numpyro_ebm.objectives.base import AuxiliaryNetwork, Objective, Problem
from numpyro_ebm.objectives.directions import half_square, second_derivative
from numpyro_ebm.types import Model, Optimizer, Params

__all__ = ["FisherDivergence", "mlp_critic"]

SCORE_WEIGHT = "critic_score_weight"
"""Name of the parameter a."""


def mlp_critic(v: jax.Array) -> jax.Array:
    """The default critic: three layers as in the VaGES paper, and a diagonal linear part.

    Its output starts at zero: the divergence is approached from below, and of a model that is right
    nothing has to be unlearned.

    :param v: visible coordinates, (rows, D).
    :return: g(v), (rows, D).
    """
    dimension = v.shape[-1]
    width = max(dimension, 64)
    x = v
    for i, (inputs, outputs) in enumerate([(dimension, width), (width, width)]):
        bound = inputs**-0.5
        weights: Any = numpyro.param(
            f"critic_weights_{i}",
            lambda key, shape=(inputs, outputs), bound=bound: jax.random.uniform(
                key, shape, minval=-bound, maxval=bound
            ),
        )
        bias: Any = numpyro.param(f"critic_bias_{i}", jnp.zeros(outputs))
        x = jax.nn.elu(x @ weights + bias)
    weights: Any = numpyro.param("critic_weights_2", jnp.zeros((width, dimension)))
    slope: Any = numpyro.param("critic_slope", jnp.zeros(dimension))
    bias: Any = numpyro.param("critic_bias_2", jnp.zeros(dimension))
    return x @ weights + slope * v + bias


class FisherDivergence(Objective):
    r"""Fisher divergence between data and model by a Stein critic, to measure or to minimise.

    .. math:: \mathcal L(θ) = \max_f E\big[s·f + e^\top (∂f/∂v)\,e - \tfrac12 \|f\|^2\big]

    :class:`~numpyro_ebm.EnergySVI` trains the critic on its own steps, upwards, and the energy
    downwards. To measure the divergence of a fixed model use
    :func:`~numpyro_ebm.fisher_divergence`, which chooses the critic by validation and reports a
    standard error.

    :param critic: a NumPyro function from visible coordinates (rows, D) (unconstrained, all sites
        side by side) to the same shape, with its parameters declared by ``numpyro.param`` or
        ``flax_module``; :func:`mlp_critic` if ``None``.
    :param marginal: how latent sites are integrated out; ``VaGES`` needs three particles where a
        residual critic trains an energy, else two.
    :param bool residual: whether f is :math:`a\,s + \text{critic}`, or the critic alone as in the
        paper.
    :param critic_optim: optimiser of the critic; a copy of the energy's if ``None``.
    :param int num_critic_steps: its steps in each round.
    :raises ModelError: if the critic is not a function or ``num_critic_steps`` not a positive
        integer; when used, if a visible site is discrete or the critic returns another shape.

    Reference: Grathwohl et al., ICML 2020; Bao et al., ICML 2021.

    **Example**

    >>> import numpyro_ebm as ebm
    >>> ebm.FisherDivergence(num_critic_steps=5).order
    3
    """

    def __init__(
        self,
        critic: Model | None = None,
        marginal: Marginal | None = None,
        *,
        residual: bool = True,
        critic_optim: Optimizer | None = None,
        num_critic_steps: int = 1,
    ):
        if critic is not None and not callable(critic):
            raise ModelError(
                "FisherDivergence: `critic` must be a NumPyro function from (rows, D) to the same "
                f"shape, got {critic!r}."
            )
        check_integer("FisherDivergence", num_critic_steps=num_critic_steps)
        self.critic = mlp_critic if critic is None else critic
        self.residual = residual
        # Third derivatives are those of the trace in the energy's parameters.
        self.order = 3 if residual else 2
        self.networks = (
            AuxiliaryNetwork(
                "critic",
                self._critic_parameters,
                self._critic_loss,
                critic_optim,
                num_critic_steps,
            ),
        )
        super().__init__(marginal)

    def check_sites(self, row_model: RowModel) -> None:
        super().check_sites(row_model)
        check_rows_alike(
            row_model,
            "FisherDivergence has one critic for all rows, of their visible values",
            "Use DenoisingScoreMatching, ScoreMatching, RankingNCE or ContrastiveDivergence.",
        )

    def _critic_parameters(self, rng_key, problem):
        v = problem.row_model.flatten(problem.unconstrained)
        with block():
            critic_trace = trace(seed(self.critic, rng_key)).get_trace(v)
        found = param_sites(critic_trace)
        if self.residual:
            found[SCORE_WEIGHT] = (jnp.zeros(()), constraints.real)
        return found

    def energy_loss(self, rng_key: jax.Array, params: Params, problem: Problem) -> jax.Array:
        linear, square = self.terms(rng_key, params, problem)
        return problem.row_model.mean(linear - 0.5 * square)

    def _critic_loss(self, rng_key, params, own, problem):
        return -self.energy_loss(rng_key, {**params, **own}, problem)

    def terms(
        self, rng_key: jax.Array, params: Params, problem: Problem
    ) -> tuple[jax.Array, jax.Array]:
        """s·f + eᵀ(∂f/∂v)e and ‖f‖² for every row, (rows,) each, along one random direction e."""
        key_marginal, key_signs = jax.random.split(rng_key)
        row_model, point = problem.row_model, problem.unconstrained
        estimate = self.estimate(key_marginal, params, problem)
        flat = row_model.flatten(point)
        signs = jax.random.rademacher(key_signs, flat.shape, flat.dtype)

        def network(v):
            with block():
                run = seed(substitute(self.critic, data=params), default_key())
                g: Any = run(v)
            if jnp.shape(g) != jnp.shape(v):
                raise ModelError(
                    f"FisherDivergence: the critic maps {jnp.shape(v)} to {jnp.shape(g)}; it must "
                    "return the shape of its argument."
                )
            return g

        g, along = jax.jvp(network, (flat,), (signs,))
        linear, square = jnp.sum(along * signs, -1), jnp.sum(g**2, -1)
        direction = row_model.unflatten(g)
        _, agreement = jax.jvp(lambda u: estimate.log_density(params, u), (point,), (direction,))
        linear = linear + agreement
        if self.residual:
            weight = params[SCORE_WEIGHT]
            score_square = 2.0 * half_square(params, estimate, problem)
            trace_of_score = second_derivative(
                params, estimate, problem, row_model.unflatten(signs)
            )
            linear = linear + weight * (score_square + trace_of_score)
            square = square + weight**2 * score_square + 2.0 * weight * agreement
        return linear, square
