# SPDX-License-Identifier: Apache-2.0
r"""Contrastive divergence: the likelihood's gradient, the model's part from a short Markov chain.

.. math:: ∂_θ \mathcal L(θ) = E_{\text{data}}\,∂_θ E - E_{v^- \sim K^k}\,∂_θ E

where E is the (free) energy and :math:`v^-` comes out of k steps of a kernel K that leaves
p(v, h; θ) invariant: started at the data (CD-k), or where it stopped in the last round (persistent
contrastive divergence, PCD-k, also stochastic maximum likelihood). As k grows both tend to the
gradient of the log-likelihood. CD-k is biased for short chains; PCD follows the model only if θ
moves slowly against its chains, and oscillates if it does not.

Use it where the model mixes well: latents and visibles may be of any kind, given a kernel for them.

Reference: Hinton, *Training products of experts by minimizing contrastive divergence*, 2002;
Tieleman, *Training restricted Boltzmann machines using approximations to the likelihood gradient*,
ICML 2008; resetting a share of the chains, Du, Mordatch, NeurIPS 2019.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.lax import stop_gradient
from numpyro.handlers import substitute
from numpyro.infer.mcmc import MCMCKernel

from numpyro_ebm._compat import not_jax_tracer
from numpyro_ebm.errors import ModelError, check_integer
from numpyro_ebm.language.handlers import fixed, uncondition
from numpyro_ebm.marginals.base import Marginal
from numpyro_ebm.model.row_analysis import check_rows_alike
from numpyro_ebm.model.row_model import RowModel
from numpyro_ebm.objectives.base import Objective, Problem
from numpyro_ebm.objectives.persistent_chains import Chains
from numpyro_ebm.objectives.summed_sites import draw_summed_sites
from numpyro_ebm.types import Params

__all__ = ["ContrastiveDivergence"]


class ContrastiveDivergence(Objective):
    r"""Contrastive divergence (CD-k) and persistent contrastive divergence (PCD-k).

    .. math:: \mathcal L(θ) = E_{\text{data}} E(v; θ) - E_{v^-} E(v^-; θ)

    with :math:`v^-` held constant. The value is the difference of the mean (free) energies in nats,
    which is near zero at the end; it is no likelihood. Where the marginal is not exact, bounds of
    the guide stand for the free energies in the value.

    :param kernel: what moves the negative phase: a function of a model that returns a NumPyro
        ``MCMCKernel``, such as :class:`~numpyro_ebm.BlockGibbs` or
        ``functools.partial(ebm.MALA, step_size=0.01)``. There is no warm-up, so that a Langevin
        kernel needs its step size. Visible sites that it sums out, such as labels beside real
        sites, are drawn from their exact conditional.
    :param int num_steps: k, kernel steps in each round.
    :param marginal: how latent sites are integrated out in the energy. Where the kernel draws the
        latents and the marginal is not exact, the negative phase takes the kernel's own.
    :param bool persistent: whether the chains go on from round to round. They are then part of the
        training state, one for each row of the batch, and are saved and resumed with it.
    :param float reset_probability: share of the persistent chains that restarts at the data in each
        round.
    :raises ModelError: if an argument is out of range; when used, if the kernel does not fit the
        supports or has no step size, or persistent chains meet covariates or another batch size.

    Warns :class:`~numpyro_ebm.ConvergenceWarning` at the end of a run whose persistent chains have
    an R-hat of 3 or more over its last 256 rounds: ``chain_diagnostics`` has them all.

    Reference: Hinton 2002; Tieleman 2008.

    **Example**

    >>> import jax, numpyro, optax
    >>> from functools import partial
    >>> import numpyro_ebm as ebm
    >>> def gaussian(data):
    ...     positive = numpyro.distributions.constraints.positive
    ...     precision = numpyro.param("precision", 1.0, constraint=positive)
    ...     with numpyro.plate("data", len(data)):
    ...         v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
    ...         ebm.energy("E", 0.5 * precision * v**2)
    >>> data = 0.5 * jax.random.normal(jax.random.key(0), (5_000,))
    >>> objective = ebm.ContrastiveDivergence(partial(ebm.MALA, step_size=0.2), num_steps=5)
    >>> svi = ebm.EnergySVI(gaussian, None, optax.adam(0.03), objective)
    >>> fit = svi.run(jax.random.key(1), 1_000, data, batch_size=500, progress_bar=False)
    >>> bool(abs(fit.params["precision"] - 4.0) < 0.4)
    True
    """

    order = 1
    is_loss = False

    def __init__(
        self,
        kernel: Callable[..., MCMCKernel],
        num_steps: int = 1,
        marginal: Marginal | None = None,
        *,
        persistent: bool = False,
        reset_probability: float = 0.0,
    ):
        if isinstance(kernel, MCMCKernel) or not callable(kernel):
            raise ModelError(
                "ContrastiveDivergence: `kernel` must be a function from a model to a kernel, such "
                f"as `BlockGibbs` or `functools.partial(MALA, step_size=0.01)`, got {kernel!r}."
            )
        check_integer("ContrastiveDivergence", num_steps=num_steps)
        if not 0 <= reset_probability <= 1:
            raise ModelError(
                "ContrastiveDivergence: `reset_probability` must be between 0 and 1, got "
                f"{reset_probability}."
            )
        if reset_probability and not persistent:
            raise ModelError(
                "ContrastiveDivergence: without `persistent=True` all chains start at the data, "
                "and `reset_probability` means nothing."
            )
        self.kernel = kernel
        self.num_steps = num_steps
        self.persistent = persistent
        self.reset_probability = reset_probability
        super().__init__(marginal)

    @property
    def has_state(self) -> bool:
        return self.persistent

    def check_sites(self, row_model: RowModel) -> None:
        self.check_observed(row_model)
        if self.persistent:
            check_rows_alike(
                row_model,
                "ContrastiveDivergence: a persistent chain meets other rows in every round",
                "Use `persistent=False`.",
            )

    # The negative phase

    def init_state(self, rng_key: jax.Array, params: Params, problem: Problem) -> Chains:
        key_start, key_move = jax.random.split(rng_key)
        start = self._at_data(key_start, params, problem)
        position = self._move(key_move, params, problem, start)
        return Chains.start(position, problem.row_model.flatten(problem.unconstrained))

    def advance(
        self, rng_key: jax.Array, params: Params, problem: Problem, state: Any
    ) -> tuple[Problem, Any]:
        key_start, key_reset, key_move = jax.random.split(rng_key, 3)
        row_model = problem.row_model
        if not self.persistent:
            start = self._at_data(key_start, params, problem)
            return problem._replace(noise=self._move(key_move, params, problem, start)), None
        position = state.position
        state.check(row_model.num_rows)
        if self.reset_probability:
            fresh = self._at_data(key_start, params, problem)
            reset = jax.random.bernoulli(key_reset, self.reset_probability, (row_model.num_rows,))
            # A latent site that the data say nothing about goes on from where it is.
            position = {
                name: _choose_rows(row_model, name, reset, fresh[name], x) if name in fresh else x
                for name, x in position.items()
            }
        position = self._move(key_move, params, problem, position)
        problem = problem._replace(noise=position)

        def latest():
            visible = {name: position[name] for name in row_model.visible}
            energies = -self._free_log_density(key_start, params, problem, visible)
            return jnp.concatenate([row_model.flatten(visible), energies[:, None]], -1)

        return problem, state.advance(stop_gradient(position), latest)

    def _at_data(self, rng_key, params, problem):
        """Where chains start: the visible values, and h as the marginal has it of a guide."""
        row_model, guide, start = problem.row_model, problem.guide, dict(problem.unconstrained)
        if guide is None or not row_model.latent:
            return start
        latent = problem.marginal.draw_latent(rng_key, row_model, guide, params, start)
        return start | {name: row_model.latent[name].transform.inv(x) for name, x in latent.items()}

    def _move(self, rng_key, params, problem, start):
        """k kernel steps from given positions, at fixed parameters."""
        row_model = problem.row_model
        own = {name: stop_gradient(params[name]) for name in row_model.parameters}
        free = uncondition(substitute(row_model.model, data=row_model.plates), row_model.visible)
        kernel = self.kernel(fixed(free, own))
        if not isinstance(kernel, MCMCKernel):
            raise ModelError(
                f"ContrastiveDivergence: `kernel(model)` returned {kernel!r}, not a NumPyro "
                "`MCMCKernel`."
            )
        numpyros = type(kernel).__module__.split(".")[0] == "numpyro"
        if row_model.num_rows != row_model.total_rows and numpyros:
            raise ModelError(
                f"ContrastiveDivergence: the plate '{row_model.plate}' subsamples itself, and "
                f"{type(kernel).__name__} would sample the density raised to the power of its "
                "scale. Drop `subsample_size` and pass `batch_size` to the run."
            )
        if row_model.row_weights is not None and numpyros:
            raise ModelError(
                f"ContrastiveDivergence: the rows have weights, and {type(kernel).__name__} of "
                "NumPyro would sample the density raised to their power. Use a kernel of "
                "numpyro_ebm, such as `BlockGibbs` or `MALA`."
            )
        args, kwargs = row_model.args, row_model.kwargs
        key_init, key_summed = jax.random.split(rng_key)
        state = kernel.init(key_init, 0, stop_gradient(start), args, kwargs)

        def step(_, state):
            return kernel.sample(state, args, kwargs)

        if self.num_steps == 1:  # no loop, so that its random numbers can be drawn ahead
            state = step(0, state)
        else:
            state = lax.fori_loop(0, self.num_steps, step, state)
        position = dict(getattr(state, kernel.sample_field))
        name = type(kernel).__name__
        return stop_gradient(
            position | draw_summed_sites(key_summed, name, row_model, own, position)
        )

    def _log_density(self, rng_key, params, problem, position):
        """log p̃ of the negative phase, (rows,), with the right first derivative in θ."""
        row_model = problem.row_model
        visible = {name: position[name] for name in row_model.visible}
        latent = {name: position[name] for name in row_model.latent if name in position}
        if len(latent) < len(row_model.latent):
            problem = problem._replace(unconstrained=visible)
            return self.estimate(rng_key, params, problem).log_density(params, visible)
        latent = {
            name: x if row_model.latent[name].is_discrete else row_model.latent[name].transform(x)
            for name, x in latent.items()
        }
        return row_model.unconstrained_log_density(params, visible, latent)

    def energy_loss(self, rng_key: jax.Array, params: Params, problem: Problem) -> jax.Array:
        key_positive, key_negative = jax.random.split(rng_key)
        estimate = self.estimate(key_positive, params, problem)
        visible = {name: problem.noise[name] for name in problem.row_model.visible}
        if problem.marginal.value == "exact":  # both phases in one evaluation of the model
            both = jax.tree.map(lambda x, y: jnp.stack([x, y]), visible, problem.unconstrained)
            negative, positive = jax.vmap(partial(estimate.log_density, params))(both)
            return problem.row_model.mean(negative - positive)
        positive = estimate.log_density(params, problem.unconstrained)
        negative = self._log_density(key_negative, params, problem, problem.noise)
        loss = problem.row_model.mean(negative - positive)
        # Both phases have the right derivative and values of their own, not to be compared.
        negative = self._free_log_density(key_negative, params, problem, visible)
        positive = self._free_log_density(key_positive, params, problem, problem.unconstrained)
        return loss + stop_gradient(problem.row_model.mean(negative - positive) - loss)

    def _free_log_density(self, rng_key, params, problem, unconstrained):
        """log p̃(v), or a bound on it that is exact if the guide is: (rows,), for its value."""
        row_model, guide = problem.row_model, problem.guide
        if problem.marginal.value is not None:
            problem = problem._replace(unconstrained=unconstrained)
            return self.estimate(rng_key, params, problem).log_density(params, unconstrained)
        visible, _ = row_model.constrain(unconstrained)
        latent = {name: x[0] for name, x in guide.draw(rng_key, params, visible, 1).items()}
        log_joint = row_model.unconstrained_log_density(params, unconstrained, latent)
        return log_joint - guide.log_density(params, visible, latent)

    def review_state(self, state: Any) -> None:
        if isinstance(state, Chains) and not_jax_tracer(state.num_rounds):
            state.review()

    def chain_diagnostics(self, state: Any) -> dict[str, np.ndarray]:
        """R-hat of the persistent chains, over every fourth of the last 256 rounds of training.

        The parameters move while the chains do, so that this says whether the chains still agree
        with each other, not whether they have converged.

        :param state: the state of :class:`~numpyro_ebm.EnergySVI`, ``fit.state``.
        :return: dict with split R-hat of the ``energy`` (scalar) and of the ``visible`` coordinates
            of a row, (coordinates,).
        :raises ModelError: if there are no persistent chains, or fewer than 16 rounds of them.
        """
        chains = getattr(state, "objective_state", None)
        if not isinstance(chains, Chains):
            raise ModelError("chain_diagnostics: this state holds no persistent chains.")
        return chains.r_hat()


def _choose_rows(row_model, name, choose, fresh, old):
    choose = jnp.reshape(choose, (-1,) + (1,) * (jnp.ndim(old) - row_model.row_axis(name, old) - 1))
    return jnp.where(choose, fresh, old)
