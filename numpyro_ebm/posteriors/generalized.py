# SPDX-License-Identifier: Apache-2.0
r"""Generalised (Gibbs) posteriors: a prior, and an objective in the place of the likelihood.

.. math:: π_β(θ \mid v) \propto π(θ)\, e^{-β N \mathcal L(θ)}

No log Z, no sampler: the loss is one of those that learn an energy without its normalizer. What is
promised is weaker than Bayes' rule: the posterior of a loss whose scale, β, has to be chosen.
"""

import copy
from typing import Any, Literal

import jax
import numpy as np
import numpyro
from jax.typing import ArrayLike

from numpyro_ebm._compat import not_jax_tracer
from numpyro_ebm.errors import ModelError
from numpyro_ebm.marginals import list_exact
from numpyro_ebm.marginals.common_random_numbers import CommonRandomNumbers
from numpyro_ebm.marginals.vages import VaGES
from numpyro_ebm.model.arguments import Arguments
from numpyro_ebm.model.priors import isolated, prior_part, read_with_priors, run_prior
from numpyro_ebm.objectives.base import Objective
from numpyro_ebm.posteriors.calibration import Calibration, CalibrationMethod, calibrate
from numpyro_ebm.posteriors.conjugate import GaussianPosterior, gaussian_posterior
from numpyro_ebm.posteriors.potential import Potential, own_parameter_prior
from numpyro_ebm.posteriors.sandwich import adjust_draws
from numpyro_ebm.posteriors.simulated_rows import AtValues, simulate_rows
from numpyro_ebm.program.compilation import run_compiled
from numpyro_ebm.program.jaxprs import needed
from numpyro_ebm.types import Model, Params

__all__ = ["generalized"]

SITE = "generalized_loss"

SERVE = (
    "ScoreMatching, SlicedScoreMatching, DenoisingScoreMatching, KernelSteinDiscrepancy, "
    "PseudoLikelihood, RatioMatching, EnergyDiscrepancy or NCE"
)


class generalized:
    r"""Give a model the generalised posterior of an objective: a NumPyro model with no log Z in it.

    .. math:: π_β(θ \mid v_{1:N}) \propto π(θ)\, e^{-β N \mathcal L(θ)}

    with :math:`\mathcal L` the objective, a mean over rows. Parameters may then be inferred by
    ``NUTS``, or by ``SVI`` with an AutoGuide (score-matching variational inference, where the
    objective is score matching). Rows have a loss and no likelihood: ``loo`` has nothing to say.

    :param model: a NumPyro model with energy statements and priors on its parameters.
    :param objective: a loss that is a function of θ and the data: score matching of every kind,
        ``KernelSteinDiscrepancy`` (KSD-Bayes; never negative with ``pairs="square"``, and robust
        with ``weight``), ``PseudoLikelihood``, ``RatioMatching``, ``EnergyDiscrepancy``, ``NCE``
        and its relatives. ``MaximumLikelihood`` gives the posterior itself.
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
        self.model = model
        self.objective = objective
        self.guide = guide
        self.guide_params = {} if guide_params is None else dict(guide_params)
        self._learning_rate = None if learning_rate == "calibrate" else learning_rate
        self._calibrated_at: Any = None
        self.calibration: Calibration | None = None
        """The last result of :meth:`calibrate`."""

    @property
    def is_adjusted(self) -> bool:
        """Whether ``to_arviz`` adjusts draws: the learning rate is one of a calibration."""
        return self._learning_rate is None

    @property
    def learning_rate(self) -> float | None:
        """β; ``None`` before a calibration that was asked for."""
        if self._learning_rate is not None:
            return self._learning_rate
        return None if self.calibration is None else self.calibration.learning_rate

    def __call__(self, *args: Any, **kwargs: Any) -> None:
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
        own = {}
        for name, (value, _) in self._own_parameters(row_model, params, args, kwargs).items():
            own[name] = numpyro.sample(name, own_parameter_prior(value))
        rng_key = numpyro.prng_key()
        if row_model.num_rows != row_model.total_rows:
            params = {**params, row_model.plate: indices}
        with isolated():
            if rng_key is None:
                if self.is_random(*args, **kwargs):
                    raise ModelError(
                        f"generalized: {self.objective!r} draws random numbers, and the model has "
                        "no random key. Run it inside of `numpyro.handlers.seed(model, rng_key)`."
                    )
                rng_key = jax.random.key(0)
            loss = run_compiled(
                lambda key, params: self._loss(key, params, args, kwargs),
                rng_key,
                {**params, **own},
            )
        numpyro.factor(SITE, -learning_rate * row_model.total_rows * loss)

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
                jax.random.key(0)
            )
        key = closed.jaxpr.invars[0]
        return any(key in eqn.invars for eqn in needed(closed.jaxpr))

    def calibrate(
        self,
        *args: Any,
        method: CalibrationMethod | None = None,
        rng_key: jax.Array | None = None,
        num_resamples: int = 200,
        groups: ArrayLike | None = None,
        cap: bool = False,
        **kwargs: Any,
    ) -> Calibration:
        r"""Measure the spread of the estimator over data sets, and choose the learning rate by it.

        With :math:`\hat θ` the minimiser of the loss, H its Hessian and J the covariance of the
        gradient of one row, the generalised posterior has the covariance :math:`(βNH)^{-1}` and the
        estimator :math:`H^{-1} J H^{-1} / N`. One number makes them equal for a single parameter;
        for more it is a compromise, and :meth:`adjust` does the rest.

        ``"sandwich"``: :math:`β = d / \operatorname{tr}(H^{-1} J)` for d parameters, the closest in
        Kullback-Leibler divergence. J is a jackknife that leaves groups of rows out (their weights
        are zero; weights of the rows' own count as well).

        ``"simulation"``: the same, J from data sets drawn at :math:`\hat θ` by
        :func:`~numpyro_ebm.sample`. It trusts the model, and needs no more than one row (a lattice,
        a network).

        ``"trace"``: :math:`β = \operatorname{tr}(H J^{-1} H) / \operatorname{tr}(H)`, as Matsubara
        et al. (2022), with ``cap=True``. Draws that are not adjusted may be far too narrow by it.

        ``"bootstrap"``: with :math:`θ_b` the minimisers on resampled rows and D = N·L,

        .. math:: β = \frac{\sum_b ∇D·∇\log π + \operatorname{tr} ∇^2 D}{\sum_b \|∇D\|^2}
            \quad\text{at } θ_b,

        the β whose posterior is closest to the :math:`θ_b` in Fisher divergence.

        :param args: arguments of the model, with all rows.
        :param str method: one of these. If ``None``, ``"sandwich"`` where there are ten rows and
            five a parameter, and else ``"simulation"``.
        :param rng_key: key of the resampling, and of a random objective's common random numbers;
            ``jax.random.key(0)`` if ``None``.
        :param int num_resamples: groups of the jackknife (at most), simulated data sets, or
            bootstrap samples; at least ten a parameter are taken.
        :param groups: an array (rows,) of labels: rows of one label may depend on each other (draws
            of one chain, persons of one household), and only groups count as independent.
        :param bool cap: take min(1, β).
        :param kwargs: keyword arguments of the model.
        :return: :class:`~numpyro_ebm.posteriors.calibration.Calibration`, kept as
            :attr:`calibration`; with ``learning_rate="calibrate"`` it is what the model uses from
            now on.
        :raises ModelError: if the loss has no minimum, its Hessian there is not positive, or there
            are too few rows or groups for the method.

        Parameters with bounded supports count in NumPyro's unconstrained coordinates.

        Reference: Ribatet, Cooley, Davison, *Bayesian inference from composite likelihoods*,
        Statistica Sinica 2012 (sandwich); Matsubara et al. 2022 (trace); Matsubara et al.,
        *Generalised Bayesian inference for discrete intractable likelihood*, JASA 2023 (bootstrap);
        Lyddon, Holmes, Walker, *General Bayesian updating and the loss-likelihood bootstrap*,
        Biometrika 2019.
        """
        key = jax.random.key(0) if rng_key is None else rng_key
        potential = self._potential(args, kwargs)
        self.calibration = calibrate(
            key,
            potential,
            method,
            num_resamples,
            groups=groups,
            cap=cap,
            simulate=lambda rng_key, params, num: simulate_rows(
                rng_key, self.model, params, num, args, kwargs
            ),
        )
        self._calibrated_at = potential, Arguments(args, kwargs)
        return self.calibration

    def adjust(self, samples: Params, *args: Any, **kwargs: Any) -> Params:
        r"""Move draws of this model to the width that their parameters have over data sets.

        .. math:: θ \leftarrow \hat θ + A(θ - \hat θ), \qquad A = \sqrt β\, H^{-1} J^{1/2} H^{1/2}

        in unconstrained coordinates, about the minimiser of the loss: the covariance
        :math:`(βNH)^{-1}` of the draws becomes :math:`H^{-1} J H^{-1} / N` (open-faced sandwich).
        Beside a prior that is not flat, A and the centre count its slope and curvature as well
        (:mod:`numpyro_ebm.posteriors.sandwich`). Draws by NUTS, of a Laplace approximation or of a
        variational guide are moved alike. Widths are right where the posterior is close to a
        Gaussian, of many rows; where the draws are not, ``WidthWarning`` says so.

        Parameters that the loss does not read, such as the mean of a hierarchy, stay as they were
        drawn, and the others are adjusted given them.

        :param dict samples: draws of all parameters, with any leading axes: of
            ``mcmc.get_samples()``, or of a guide's ``sample_posterior``.
        :param args: arguments of the model of which they are draws, if it is to be checked that
            they are those of the calibration.
        :param kwargs: its keyword arguments.
        :return: dict of the adjusted draws, and of the model's deterministic sites at them. Other
            entries of ``samples`` are left out.
        :raises ModelError: if there has been no calibration, or one at other data; if parameters
            are missing or have wrong shapes.

        Reference: Shaby, *The open-faced sandwich adjustment for MCMC using estimating functions*,
        JCGS 2014.
        """
        learning_rate = self.learning_rate
        if self.calibration is None or learning_rate is None:
            raise ModelError(
                "generalized.adjust: widths come from a calibration, and there has been none. Call "
                "`model.calibrate(data)` first."
            )
        potential, arguments = self._calibrated_at
        if (args or kwargs) and not _at_same_data(arguments, Arguments(args, kwargs)):
            raise ModelError(
                "generalized.adjust: the calibration was made at other data than the draws. Call "
                "`model.calibrate(data)` with the data of the run, and run again."
            )
        return adjust_draws(samples, potential, self.calibration, learning_rate)

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
            problem = self._prepare(jax.random.key(0), params, args, kwargs)
            return self.objective.own_parameters(jax.random.key(0), params, problem)

    def _prepare(self, rng_key, params, args, kwargs, values=None, weights=None):
        params = {**self.guide_params, **params}
        model, guide = self.model, self.guide
        if values is not None:
            model, args = AtValues(model), (values, *args)
            guide = None if guide is None else AtValues(guide, observes=False)
        problem = self.objective.prepare(rng_key, params, model, guide, args, kwargs)
        if weights is not None:
            row_model = copy.copy(problem.row_model)
            row_model.row_weights = row_model.weigh(weights)
            problem = problem._replace(row_model=row_model)
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


def _at_same_data(a, b):
    pairs = ((x, b.arrays[label]) for label, x in a.arrays.items() if label in b.arrays)
    return a.have_form_of(b) and all(np.array_equal(x, y, equal_nan=True) for x, y in pairs)


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


def _check_learning_rate(learning_rate):
    if learning_rate == "calibrate":
        return
    if isinstance(learning_rate, str) or not 0 < learning_rate < float("inf"):
        raise ModelError(
            "generalized: `learning_rate` must be a positive number or 'calibrate', got "
            f"{learning_rate!r}."
        )
