# SPDX-License-Identifier: Apache-2.0
"""What a posterior of a loss knows of its width: a learning rate, a calibration, adjusted draws."""

from abc import ABC, abstractmethod
from typing import Any, Literal

import jax
import numpy as np
from jax.typing import ArrayLike

from numpyro_ebm.errors import ModelError
from numpyro_ebm.keys import default_key
from numpyro_ebm.model.arguments import Arguments
from numpyro_ebm.posteriors.calibration import Calibration, CalibrationMethod, calibrate
from numpyro_ebm.posteriors.potential import Potential
from numpyro_ebm.posteriors.sandwich import adjust_draws
from numpyro_ebm.posteriors.simulated_rows import simulate_rows
from numpyro_ebm.types import Model, Params

__all__ = ["Calibrated"]


class Calibrated(ABC):
    """The width of a posterior of a loss; base class of :class:`~numpyro_ebm.generalized`.

    :param learning_rate: β, or ``"calibrate"``.
    """

    model: Model

    def __init__(self, learning_rate: float | Literal["calibrate"]):
        self._learning_rate = None if learning_rate == "calibrate" else learning_rate
        self._calibrated_at: Any = None
        self.calibration: Calibration | None = None
        """The last result of :meth:`calibrate`."""

    @abstractmethod
    def _potential(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Potential:
        """Loss and log-prior as functions of one unconstrained vector."""

    @property
    def is_adjusted(self) -> bool:
        """Whether ``to_arviz`` adjusts draws, as the learning rate is one of a calibration."""
        return self._learning_rate is None

    @property
    def learning_rate(self) -> float | None:
        """β; ``None`` before a calibration that was asked for."""
        if self._learning_rate is not None:
            return self._learning_rate
        return None if self.calibration is None else self.calibration.learning_rate

    def calibrate(
        self,
        *args: Any,
        method: CalibrationMethod | None = None,
        rng_key: jax.Array | None = None,
        num_resamples: int = 200,
        groups: ArrayLike | None = None,
        cap: bool = False,
        progress_bar: bool = True,
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
            one of the library's own if ``None``.
        :param int num_resamples: groups of the jackknife (at most), simulated data sets, or
            bootstrap samples; at least ten a parameter are taken.
        :param groups: an array (rows,) of labels: rows of one label may depend on each other (draws
            of one chain, persons of one household), and only groups count as independent.
        :param bool cap: take min(1, β).
        :param bool progress_bar: show the progress of a bootstrap, from a second on.
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
        key = default_key() if rng_key is None else rng_key
        potential = self._potential(args, kwargs)
        self.calibration = calibrate(
            key,
            potential,
            method,
            num_resamples,
            groups=groups,
            cap=cap,
            progress_bar=progress_bar,
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


def _at_same_data(a, b):
    pairs = ((x, b.arrays[label]) for label, x in a.arrays.items() if label in b.arrays)
    return a.have_form_of(b) and all(np.array_equal(x, y, equal_nan=True) for x, y in pairs)
