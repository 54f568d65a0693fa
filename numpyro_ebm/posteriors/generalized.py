# SPDX-License-Identifier: Apache-2.0
r"""Generalised (Gibbs) posteriors: a prior, and an objective in the place of the likelihood.

.. math:: π_β(θ \mid v) \propto π(θ)\, e^{-β N \mathcal L(θ)}

No log Z, no sampler: the loss is one of those that learn an energy without its normalizer. What is
promised is weaker than Bayes' rule: the posterior of a loss whose scale, β, has to be chosen.
"""

import copy
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpyro

from numpyro_ebm._compat import not_jax_tracer
from numpyro_ebm.errors import ModelError
from numpyro_ebm.inputs import as_arrays
from numpyro_ebm.keys import default_key
from numpyro_ebm.language.primitives import always_observed
from numpyro_ebm.marginals import list_exact
from numpyro_ebm.marginals.common_random_numbers import CommonRandomNumbers
from numpyro_ebm.marginals.vages import VaGES
from numpyro_ebm.model.enumerated_values import EnumeratedValues
from numpyro_ebm.model.priors import (
    data_plate,
    isolated,
    prior_part,
    read_with_priors,
    run_prior,
)
from numpyro_ebm.objectives.base import Objective
from numpyro_ebm.posteriors.calibrated import Calibrated
from numpyro_ebm.posteriors.conjugate import GaussianPosterior, gaussian_posterior
from numpyro_ebm.posteriors.potential import Potential, own_parameter_prior
from numpyro_ebm.posteriors.simulated_rows import AtValues
from numpyro_ebm.program.jaxprs import needed
from numpyro_ebm.signatures import checked
from numpyro_ebm.types import Model, Params

__all__ = ["generalized"]

SITE = "generalized_loss"

SERVE = (
    "ScoreMatching, SlicedScoreMatching, DenoisingScoreMatching, KernelSteinDiscrepancy, "
    "PseudoLikelihood, RatioMatching, EnergyDiscrepancy or NCE"
)


class generalized(Calibrated):
    r"""Give a model the generalised posterior of an objective: a NumPyro model with no log Z in it.

    .. math:: π_β(θ \mid v_{1:N}) \propto π(θ)\, e^{-β N \mathcal L(θ)}

    with :math:`\mathcal L` the objective, a mean over rows. Parameters may then be inferred by
    ``NUTS``, or by ``SVI`` with an AutoGuide (score-matching variational inference, where the
    objective is score matching). Rows have a loss and no likelihood: ``loo`` has nothing to say.

    :param model: a NumPyro model with energy statements and priors on its parameters.
    :param objective: a loss that is a function of θ and the data: score matching of every kind,
        ``KernelSteinDiscrepancy`` (KSD-Bayes; never negative with ``pairs="square"``, and robust
        with ``weight``), ``DiscreteFisher`` (counts without an end as well),
        ``PseudoLikelihood``, ``RatioMatching``, ``EnergyDiscrepancy``, ``NCE`` and its relatives.
        ``MaximumLikelihood`` gives the posterior itself.
    :param learning_rate: β, a positive number, or ``"calibrate"``: widths are then those of the
        estimator over data sets. β is the best that one number does, by :meth:`calibrate` at the
        first data that the model is run with (:attr:`learning_rate` then holds it), and
        :meth:`adjust` corrects the draws in every direction; ``to_arviz`` does it by itself.
    :param guide: q(h | v), for a model whose latent sites are not summed out; the objective then
        needs ``marginal=VaGES(num_particles, importance_weighted=True)``.
    :param dict guide_params: values of the guide's parameters, from a fit.
    :return: a NumPyro model with the same arguments.
    :raises ModelError: if ``learning_rate`` is not positive, or the objective has networks or a
        state of its own; when run, if no parameter has a prior or a prior is improper, or the
        model, the guide and the objective do not go together.

    **Random objectives.** Slices, noise and particles come from NumPyro's ``prng_key``. NumPyro's
    MCMC kernels evaluate a model with one key throughout, so that their potential is a
    deterministic function: the posterior is the one at these common random numbers (raise the
    number of slices or particles until another key makes no difference). Under ``SVI`` they are
    fresh in every step. ``VaGES`` becomes the importance-weighted estimate at common particles, of
    which value and gradient belong together.

    A plate that subsamples its rows is respected: the loss is a mean over them, and N all rows.
    An objective's own parameters (``log_normalizer`` of NCE) become sites with a normal prior of
    scale 10 around their initial value.

    Reference: Bissiri, Holmes, Walker, *A general framework for updating belief distributions*,
    JRSSB 2016; Matsubara, Knoblauch, Briol, Oates, *Robust generalised Bayesian inference for
    intractable likelihoods* (KSD-Bayes), JRSSB 2022.

    **Example**

    >>> import jax
    >>> import numpyro
    >>> import numpyro.distributions as dist
    >>> import numpyro_ebm as ebm
    >>> def gaussian(data):
    ...     precision = numpyro.sample("precision", dist.Normal(1.0, 10.0))
    ...     with numpyro.plate("data", len(data)):
    ...         v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
    ...         ebm.energy("E", 0.5 * precision * v**2)
    >>> data = jax.random.normal(jax.random.key(0), (200,))
    >>> model = ebm.generalized(gaussian, ebm.ScoreMatching(), learning_rate=0.5)
    >>> mcmc = numpyro.infer.MCMC(
    ...     numpyro.infer.NUTS(model), num_warmup=300, num_samples=1_000, progress_bar=False
    ... )
    >>> mcmc.run(jax.random.key(1), data)
    >>> exact = model.closed_form(data)  # the loss is quadratic in θ, the prior normal
    >>> gap = mcmc.get_samples()["precision"].mean() - exact.mean["precision"]
    >>> bool(abs(gap) < 0.2 * exact.standard_deviation["precision"])
    True
    """

    posterior_kind = "loss"  # for `to_arviz`

    @checked
    def __init__(
        self,
        model: Model,
        objective: Objective,
        learning_rate: float | Literal["calibrate"] = 1.0,
        *,
        guide: Model | None = None,
        guide_params: Params | None = None,
    ):
        _check_objective(objective)
        _check_learning_rate(learning_rate)
        if guide_params is not None and guide is None:
            raise ModelError("generalized: `guide_params` are those of a guide. Pass `guide=` too.")
        self.model = model
        self.objective = objective
        self.guide = guide
        self.guide_params = {} if guide_params is None else dict(guide_params)
        super().__init__(learning_rate)

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        args, kwargs = as_arrays(args, kwargs)
        learning_rate = self.learning_rate
        if learning_rate is None:
            if not all(map(not_jax_tracer, jax.tree.leaves((args, kwargs)))):
                raise ModelError(
                    "generalized: learning_rate='calibrate' needs data whose values are known, and "
                    "the model runs for the first time inside a compiled function. Call "
                    "`model.calibrate(data)` first."
                )
            with isolated(), jax.ensure_compile_time_eval():
                learning_rate = self.calibrate(*args, **kwargs).learning_rate
        row_model = read_with_priors(self.model, args, kwargs, "generalized")
        params, _, indices = run_prior(self.model, args, kwargs, row_model.plate)
        params = {name: params[name] for name in row_model.parameters}
        _check_one_batch(row_model, indices)
        own = {}
        for name, (value, _) in self._own_parameters(row_model, params, args, kwargs).items():
            own[name] = numpyro.sample(name, own_parameter_prior(value))
        rng_key = numpyro.prng_key()
        values = EnumeratedValues.find({**params, **own}, row_model, "generalized")
        at = {row_model.plate: indices} if row_model.num_rows != row_model.total_rows else {}
        with isolated():
            if rng_key is None:
                if self.is_random(*args, **kwargs):
                    raise ModelError(
                        f"generalized: {self.objective!r} draws random numbers, and the model has "
                        "no random key. Run it inside of `numpyro.handlers.seed(model, rng_key)`."
                    )
                rng_key = default_key()
            loss = values.map(lambda params: self._loss(rng_key, {**params, **at}, args, kwargs))
        # The share of a row, so that NumPyro sees the plate: it enumerates left of those it sees.
        share = values.place(-learning_rate * loss)
        share = jnp.expand_dims(share, tuple(range(jnp.ndim(share), 1)))
        shape = (row_model.num_rows,) + (1,) * (-1 - row_model.dim)
        share = jnp.broadcast_to(share, jnp.broadcast_shapes(jnp.shape(share), shape))
        with data_plate(row_model, indices), always_observed():
            numpyro.factor(SITE, share)

    def loss(self, rng_key: jax.Array, params: Params, *args: Any, **kwargs: Any) -> jax.Array:
        """The objective at given parameters, a mean over rows.

        :param rng_key: key of the objective's random numbers.
        :param dict params: values of the parameters with priors, and of others.
        :param args: arguments of the model.
        :param kwargs: keyword arguments of the model.
        :return: scalar.
        """
        return self._loss(rng_key, params, args, kwargs)

    def is_random(self, *args: Any, **kwargs: Any) -> bool:
        """Whether the objective draws random numbers for this model."""
        with isolated():
            row_model = read_with_priors(self.model, args, kwargs, "generalized")
            own = self._own_parameters(row_model, row_model.parameters, args, kwargs)
            params = {**row_model.parameters, **{k: v for k, (v, _) in own.items()}}
            closed = jax.make_jaxpr(lambda key: self._loss(key, params, args, kwargs))(
                default_key()
            )
        key = closed.jaxpr.invars[0]
        return any(key in eqn.invars for eqn in needed(closed.jaxpr))

    def closed_form(self, *args: Any, **kwargs: Any) -> GaussianPosterior:
        r"""The posterior itself where it is Gaussian: a loss quadratic in θ and a normal prior.

        Score matching of every kind and KSD are quadratic in θ where the energy is linear in it. It
        is the posterior at β, whose draws :meth:`adjust` moves.

        :param args: arguments of the model.
        :param kwargs: keyword arguments of the model.
        :return: :class:`~numpyro_ebm.posteriors.conjugate.GaussianPosterior`.
        :raises ModelError: if the posterior is not Gaussian (the curvature of its log-density
            changes from place to place), or not proper.
        """
        with isolated():
            learning_rate = self.learning_rate
            if learning_rate is None:
                learning_rate = self.calibrate(*args, **kwargs).learning_rate
            return gaussian_posterior(self._potential(args, kwargs), learning_rate)

    # Internal

    def _own_parameters(self, row_model, params, args, kwargs):
        if type(self.objective).own_parameters is Objective.own_parameters:
            return {}
        with isolated():
            problem = self._prepare(default_key(), params, args, kwargs)
            return self.objective.own_parameters(default_key(), params, problem)

    def _prepare(self, rng_key, params, args, kwargs, values=None, weights=None):
        params = {**self.guide_params, **params}
        model, guide = self.model, self.guide
        if values is not None:
            model, args = AtValues(model), (values, *args)
            guide = None if guide is None else AtValues(guide, observes=False)
        problem = self.objective.prepare(rng_key, params, model, guide, args, kwargs)
        return _of_posterior(problem, weights)

    def _loss(self, rng_key, params, args, kwargs, **changed):
        """The loss; ``values`` of visible sites, or ``weights`` of rows, may be changed."""
        key_prepare, key_loss = jax.random.split(rng_key)
        problem = self._prepare(key_prepare, params, args, kwargs, **changed)
        return self.objective.energy_loss(key_loss, {**self.guide_params, **params}, problem)

    def _potential(self, args, kwargs):
        """Loss and log-prior as functions of one unconstrained vector."""
        row_model = read_with_priors(self.model, args, kwargs, "generalized")
        own = self._own_parameters(row_model, row_model.parameters, args, kwargs)
        return Potential(
            self._loss, prior_part(self.model, row_model.plate), row_model, own, args, kwargs
        )


def _of_posterior(problem, weights):
    """A problem at any θ and ``weights`` of rows, if any; those of its parts as well."""
    if weights is not None:
        row_model = copy.copy(problem.row_model)
        row_model.row_weights = row_model.weigh(weights)
        problem = problem._replace(row_model=row_model)
    if problem.parts:
        return problem._replace(parts=tuple(_of_posterior(x, weights) for x in problem.parts))
    marginal = problem.marginal
    if marginal.needs_guide:
        if not (isinstance(marginal, VaGES) and marginal.importance_weighted):
            raise ModelError(
                f"generalized: {marginal!r} estimates derivatives, for a guide that is the "
                "posterior of h at the same θ, and a posterior of θ has many. Use "
                "`VaGES(num_particles, importance_weighted=True)`, or an exact marginal: "
                f"{list_exact()}."
            )
        marginal = CommonRandomNumbers(marginal.num_particles)
    elif marginal.value != "exact":
        raise ModelError(
            f"generalized: {marginal!r} does not serve. Use {list_exact()}, or "
            "`VaGES(num_particles, importance_weighted=True)` with a guide."
        )
    return problem._replace(marginal=marginal)


def _check_objective(objective):
    if not isinstance(objective, Objective):
        raise ModelError(
            f"generalized: `objective` must be an objective such as `ScoreMatching()`, got "
            f"{objective!r}."
        )
    if objective.has_state or objective.networks or not objective.is_loss:
        raise ModelError(
            f"generalized: {type(objective).__name__} is no function of the parameters and the "
            f"data alone: it has chains or networks of its own, or a gradient and no value. Use "
            f"{SERVE}."
        )


def _check_one_batch(row_model, indices):
    """Raise where other rows are asked for than one batch: a loss is of all of them together."""
    if jnp.size(indices) == row_model.num_rows:
        return
    raise ModelError(
        f"generalized: the plate '{row_model.plate}' has {row_model.num_rows} rows and was given "
        f"{jnp.size(indices)}. Who does that, as the `taylor_proxy` of HMCECS, wants likelihoods "
        "of single rows, and a loss has none. Use HMCECS without a proxy, NUTS without a "
        "`subsample_size`, or `normalized`, which has them."
    )


def _check_learning_rate(learning_rate):
    if learning_rate == "calibrate":
        return
    if isinstance(learning_rate, str) or not 0 < learning_rate < float("inf"):
        raise ModelError(
            "generalized: `learning_rate` must be a positive number or 'calibrate', got "
            f"{learning_rate!r}."
        )
