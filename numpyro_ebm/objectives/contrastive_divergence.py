# SPDX-License-Identifier: Apache-2.0
r"""Contrastive divergence, with chains that start at the data, at noise, or where they stopped.

.. math:: ∇_θ E \log p(v; θ) = E_{p(v; θ)} ∇_θ E(v; θ) - E_{\text{data}} ∇_θ E(v; θ)

and the first expectation comes out of k steps of a kernel K that leaves
p(v, h; θ) invariant: started at the data (CD-k), or where it stopped in the last round (persistent
contrastive divergence, PCD-k, also stochastic maximum likelihood). As k grows both tend to the
gradient of the log-likelihood. CD-k is biased for short chains; PCD follows the model only if θ
moves slowly against its chains, and oscillates if it does not.

Use it where the model mixes well: latents and visibles may be of any kind, given a kernel for them.
Where chains of a model that has learned do not cross between its modes, chains that carry their
work (``weighted=True``) have the right proportions still, and know log Z.

Reference: Hinton, *Training products of experts by minimizing contrastive divergence*, 2002;
Tieleman, *Training restricted Boltzmann machines using approximations to the likelihood gradient*,
ICML 2008; a replay buffer, resetting a share of the chains, and the penalty of energies, Du,
Mordatch, *Implicit generation and modeling with energy-based models*, NeurIPS 2019; weighted
chains, Carbone, Hua, Coste, Vanden-Eijnden, NeurIPS 2023; :mod:`.chain_penalties` has the others.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import stop_gradient
from numpyro.infer.mcmc import MCMCKernel

from numpyro_ebm._compat import not_jax_tracer
from numpyro_ebm.errors import ModelError, check_integer
from numpyro_ebm.log_normalizers.result import LogNormalizer
from numpyro_ebm.marginals import list_exact
from numpyro_ebm.marginals.base import Marginal
from numpyro_ebm.model.row_groups import in_groups
from numpyro_ebm.objectives.base import Problem
from numpyro_ebm.objectives.chain_history import Remembers
from numpyro_ebm.objectives.chain_moves import KernelSteps, joined_rows, parted_rows
from numpyro_ebm.objectives.chain_options import ChainOptions
from numpyro_ebm.objectives.chain_penalties import chain_divergence, energy_penalties
from numpyro_ebm.objectives.chain_weights import read_log_normalizer, review_weights
from numpyro_ebm.objectives.negative_phase import NegativePhase
from numpyro_ebm.objectives.persistent_chains import Chains
from numpyro_ebm.types import Params

__all__ = ["ContrastiveDivergence"]


class ContrastiveDivergence(NegativePhase):
    r"""Contrastive divergence (CD-k) and persistent contrastive divergence (PCD-k).

    .. math:: \mathcal L(θ) = E_{\text{data}} E(v; θ) - E_{v^-} E(v^-; θ)

    with :math:`v^-` held constant. The value is the difference of the mean (free) energies in nats,
    which is near zero at the end; it is no likelihood. Where the marginal is not exact, bounds of
    the guide stand for the free energies in the value, and joint energies with particles.

    :param kernel: what moves the negative phase: a function of a model that returns a NumPyro
        ``MCMCKernel``, such as :class:`~numpyro_ebm.BlockGibbs` or
        ``functools.partial(ebm.MALA, step_size=0.01)``. There is no warm-up, so that a Langevin
        kernel needs its step size. Visible sites that it sums out, such as labels beside real
        sites, are drawn from their exact conditional.
    :param int num_steps: k, kernel steps in each round.
    :param marginal: how latent sites are integrated out in the energy. Where the kernel draws the
        latents and the marginal is not exact, the negative phase takes the kernel's own.
    :param bool persistent: whether the chains go on from round to round. They are then part of the
        training state, and are saved and resumed with it. Where rows have covariates, each row of
        the data has a chain of its own, which moves when the row is in the batch.
    :param int num_chains: persistent chains that move in a round; as many as the batch has rows if
        ``None``.
    :param int buffer: how many persistent chains are kept, of which ``num_chains`` move in a round,
        neighbours from a random place on (a replay buffer); all that are kept if ``None``.
    :param initial: where chains begin: ``"data"``, the rows of the batch; ``"gaussian"``,
        independent Gaussians with the means and standard deviations of its unconstrained
        coordinates; ``"uniform"``, noise on bounded or finite supports; or a noise as
        :class:`~numpyro_ebm.NCE` takes it, a NumPyro distribution for one. Chains that are not
        persistent begin there in every round.
    :param float reset_probability: share of the persistent chains of a round that begins anew.
    :param bool adjusted_resets: begin anew only where a Metropolis-Hastings test accepts it. Resets
        then leave the model invariant, and carry chains from mode to mode where ``initial`` covers
        them, in few dimensions.
    :param bool weighted: whether persistent chains carry the work of training as weights. The
        gradient is then consistent in the number of chains even where they do not mix, and
        :meth:`log_normalizer` knows log Z. Half of the chains give the gradient, the other half
        measures; they begin at a distribution (``initial``), and log Z is as good as its overlap
        with the model that training starts from.
    :param float energy_penalty: α of a penalty :math:`α (E_{\text{data}} E^2 + E_{v^-} E^2)` that
        keeps the energies of networks, which the loss knows up to a constant, near zero.
    :param history: what is remembered of the last 256 rounds of persistent chains, every fourth of
        them, for ``chain_diagnostics``: ``"light"``, energies and 16 fixed random projections of
        the visible coordinates (all of them where there are no more) of up to 256 chains;
        ``"full"``, energies and all visible coordinates of all chains, which may take more memory
        than the data; or ``None``. With covariates nothing is.
    :param float temperature: T at which the model is learned: both phases are those of the energies
        over T (:class:`~numpyro_ebm.temper`), and the loss is T times their contrast. A fit has T
        among its ``params``, so that ``fixed(model, fit.params)`` is the model that was learned.
        Chains of steps α with noise σ, z' = z - α ∇E(z) + σ ξ, are ``ULA`` with the step size σ²/2
        at T = σ²/(2α).
    :param float gradient_penalty: β of a penalty :math:`β (E_{\text{data}} \|∇_v E\|^2 + E_{v^-}
        \|∇_v E\|^2)`, in unconstrained coordinates, that keeps the energies of networks smooth.
    :param float kl_weight: weight of :math:`\mathrm{KL}(q_θ \| p)` of the chains after one more
        Langevin step, differentiated through :math:`q_θ` alone, with its entropy by nearest
        neighbours among the chains; see :mod:`~numpyro_ebm.objectives.chain_penalties`. It teaches
        the energy to lead its chains to low energies and far from each other. The value of the
        loss is left as it is.
    :param float kl_step_size: ε of that step, in squared units of the unconstrained sites.
    :raises ModelError: if an argument is out of range, or options contradict each other; when used,
        if the kernel does not fit the supports or has no step size, chains cannot begin at
        ``initial``, persistent chains meet another batch size, or rows that have covariates and
        come from elsewhere than ``EnergySVI.run``.

    Warns :class:`~numpyro_ebm.ConvergenceWarning` at the end of a run whose persistent chains have
    an R-hat of 3 or more over its last 256 rounds (``chain_diagnostics`` has them all); of weighted
    chains, if log Z is known to no better than half a nat; and of chains that belong to rows, if
    their energies do not stay in further steps (:mod:`~numpyro_ebm.objectives.chain_balance`).

    Reference: Hinton 2002; Tieleman 2008; Du, Mordatch 2019; Carbone et al. 2023; the penalty of
    gradients, Kumar et al. 2019; the divergence of the chains, Du et al. 2021.

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
        num_chains: int | None = None,
        buffer: int | None = None,
        initial: Any = "data",
        reset_probability: float = 0.0,
        adjusted_resets: bool = False,
        weighted: bool = False,
        energy_penalty: float = 0.0,
        history: Remembers = "light",
        temperature: float = 1.0,
        gradient_penalty: float = 0.0,
        kl_weight: float = 0.0,
        kl_step_size: float | None = None,
    ):
        check_integer("ContrastiveDivergence", num_steps=num_steps)
        self._steps = KernelSteps(kernel, num_steps, weighted)
        self._options = ChainOptions(
            persistent,
            num_chains,
            buffer,
            initial,
            reset_probability,
            adjusted_resets,
            weighted,
            energy_penalty,
            history,
            temperature,
            gradient_penalty,
            kl_weight,
            kl_step_size,
        )
        self._options.check()
        self.kernel, self.num_steps = kernel, num_steps
        vars(self).update(self._options._asdict())  # to be read, and in the repr
        super().__init__(marginal)

    def check_marginal(self, marginal: Marginal) -> None:
        super().check_marginal(marginal)
        if self._options.kl_weight and marginal.value != "exact":
            raise ModelError(
                f"ContrastiveDivergence: `kl_weight` wants log p̃(v) itself, and {marginal!r} does "
                f"not have it. Use {list_exact()} where it covers the latent sites."
            )

    def energy_loss(self, rng_key: jax.Array, params: Params, problem: Problem) -> jax.Array:
        key_positive, key_negative = jax.random.split(rng_key)
        estimate = self.estimate(key_positive, params, problem)
        row_model, chains = problem.row_model, problem.noise.position
        visible = {name: chains[name] for name in row_model.visible}
        if problem.marginal.value == "exact":  # both phases in one evaluation of the model

            def log_density(rows):
                return estimate.log_density(params, row_model.from_rows(rows))

            both = joined_rows(problem, visible)
            values = in_groups(log_density, row_model.num_rows, both)
            loss = self._contrast(problem, *parted_rows(problem, values))
        else:
            positive = estimate.log_density(params, problem.unconstrained)
            negative = self._densities(key_negative, params, problem, chains)
            loss = self._contrast(problem, positive, negative)
            if not problem.marginal.has_state:  # particles have joint energies, as the chains have
                # Both have the right derivative and values of their own, not to be compared.
                data = row_model.to_rows(problem.unconstrained)
                positive = self._free_densities(key_positive, params, problem, data)
                negative = self._free_densities(key_negative, params, problem, visible)
                loss += stop_gradient(self._contrast(problem, positive, negative) - loss)
        options = self._options
        if options.kl_step_size is not None:
            found = chain_divergence(
                jax.random.fold_in(key_negative, 1),
                lambda params, x: self._free_densities(key_negative, params, problem, x),
                params,
                problem,
                visible,
                options.kl_step_size,
            )
            loss += options.kl_weight * (found - stop_gradient(found))  # a gradient, and no value
        loss *= options.temperature
        if options.energy_penalty or options.gradient_penalty:
            penalties = options.energy_penalty, options.gradient_penalty
            values = energy_penalties(params, problem, visible, options.temperature, *penalties)
            positive, negative = parted_rows(problem, values)
            weights = problem.noise.weights
            mean = jnp.mean(negative) if weights is None else weights @ negative
            loss += row_model.mean(positive) + mean
        return loss

    def _contrast(self, problem, positive, negative):
        """What log-densities of the chains have over those of the rows, in the mean."""
        row_model, weights = problem.row_model, problem.noise.weights
        if not self._options.persistent or row_model.covariates:  # a chain belongs to a row
            return row_model.mean(negative - positive)
        mean = jnp.mean(negative) if weights is None else weights @ negative
        return row_model.mean(mean - positive)

    # What the chains tell

    def review_state(self, state: Any) -> None:
        if isinstance(state, Chains) and not_jax_tracer(state.num_rounds):
            if state.log_weights is None:
                state.review()
            else:  # they need not come around
                review_weights(state.log_weights)

    def chain_diagnostics(self, state: Any) -> dict[str, np.ndarray]:
        """R-hat of the persistent chains, over every fourth of the last 256 rounds of training.

        The parameters move while the chains do, so that this says whether the chains still agree
        with each other, not whether they have converged.

        :param state: the state of :class:`~numpyro_ebm.EnergySVI`, ``fit.state``.
        :return: dict with split R-hat of the ``energy`` (scalar) and, as ``history`` has it, of the
            ``visible`` coordinates of a row, (coordinates,), or of 16 ``projections`` of them.
        :raises ModelError: if there are no persistent chains, nothing is remembered of them, or
            there were fewer than 16 rounds.
        """
        chains = _chains_of(state, "chain_diagnostics")
        if chains.history is None:
            why = (
                "each is that of a row of the data" if chains.begun is not None else "history=None"
            )
            raise ModelError(f"chain_diagnostics: nothing is remembered of the chains ({why}).")
        return chains.history.r_hat(chains.num_rounds)

    def log_normalizer(self, state: Any) -> LogNormalizer:
        r"""log Z of a row at the parameters of a fit, from weighted chains.

        .. math:: \widehat{\log Z} = \log \frac1M \sum_c w_c

        over the M chains that measure. Its error comes from 16 groups of them that are independent
        given the parameters.

        :param state: the state of :class:`~numpyro_ebm.EnergySVI`, ``fit.state``.
        :return: :class:`~numpyro_ebm.log_normalizers.LogNormalizer`; in its ``diagnostics`` the
            effective number of the chains that give the gradient.
        :raises ModelError: if there are no weighted chains.
        """
        chains = _chains_of(state, "log_normalizer")
        if chains.log_weights is None:
            raise ModelError(
                "log_normalizer: these persistent chains have no weights; train with "
                "`ContrastiveDivergence(..., persistent=True, weighted=True)`, or estimate log Z "
                "afterwards, `numpyro_ebm.log_normalizer(rng_key, fixed(model, fit.params), ...)`."
            )
        return read_log_normalizer(chains.log_weights)


def _chains_of(state, who):
    chains = getattr(state, "objective_state", None)
    if not isinstance(chains, Chains):
        raise ModelError(f"{who}: this state holds no persistent chains.")
    return chains
