# SPDX-License-Identifier: Apache-2.0
"""Noise-contrastive estimation, which learns log Z as a parameter, with its standard error."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax.flatten_util import ravel_pytree
from jax.nn import sigmoid, softplus
from jax.scipy.special import logsumexp
from numpyro.distributions import constraints

from numpyro_ebm._compat import eval_provenance
from numpyro_ebm.errors import ModelError, check_finite, check_integer
from numpyro_ebm.log_normalizers.result import LogNormalizer
from numpyro_ebm.marginals.base import Marginal
from numpyro_ebm.model.reading import read_model
from numpyro_ebm.model.row_analysis import check_rows_alike
from numpyro_ebm.model.row_model import RowModel
from numpyro_ebm.objectives.base import AuxiliaryNetwork, Problem
from numpyro_ebm.objectives.noise_contrast import NoiseContrast
from numpyro_ebm.objectives.overlap import warn_if_apart
from numpyro_ebm.types import Model, Optimizer, Params

__all__ = ["NCE"]

LOG_NORMALIZER = "log_normalizer"
"""Name of the parameter log Z of :class:`NCE`."""

MOST_PARAMETERS = 2_000
"""The most parameters whose joint covariance is inverted for a standard error."""


class NCE(NoiseContrast):
    r"""Noise-contrastive estimation (NCE), and with ``ImportanceBound`` variational NCE (VNCE).

    .. math:: \mathcal L(θ, \log Z) = E_{\text{data}}\, \mathrm{softplus}(-G(v)) +
        ν\,E_q\, \mathrm{softplus}(G(v)), \qquad
        G(v) = \log\tilde p(v; θ) - \log Z - \log ν - \log q(v)

    The objective's own parameter ``log_normalizer``, among the results of
    :class:`~numpyro_ebm.EnergySVI`, is an estimate of log Z(θ); :meth:`log_normalizer` adds its
    standard error.

    With ``ImportanceBound`` the data term is an upper bound of the loss's (a lower bound on log p̃
    enters a decreasing function), and the noise term the importance-sampled one of VNCE, consistent
    as the number of particles grows.

    :param noise: q, a NumPyro distribution over one row of the visible site, a dict of them by site
        name, or a NumPyro function which returns one or samples the visible sites. Parameters of a
        function are fitted to the data by maximum likelihood beside the energy.
    :param int noise_ratio: ν, noise draws for each row.
    :param marginal: how latent sites are integrated out, by a marginal with exact values or
        by :class:`~numpyro_ebm.ImportanceBound`.
    :param float init_log_normalizer: where log Z starts; the importance-sampling estimate by the
        noise if ``None``. The checkerboard of the VaGES paper starts at 0, far above the noise, and
        leaves the first plateau sooner for it.
    :param noise_optim: optimiser of a noise with parameters; a copy of the energy's if ``None``.
    :param int num_noise_steps: its steps in each round.
    :raises ModelError: if ``noise_ratio`` is not a positive integer; when used, if the noise does
        not fit the visible sites, the marginal has no values, or the energy reads covariates: each
        row then has a log Z of its own, and :class:`~numpyro_ebm.RankingNCE` or a score-based
        objective is right.

    Warns :class:`~numpyro_ebm.errors.FarNoiseWarning` at the end of a run if the noise is so far
    from the data that the loss is flat.

    Reference: Gutmann, Hyvärinen, JMLR 2012; Rhodes, Gutmann, AISTATS 2019.

    **Example**

    >>> import jax, numpyro, optax
    >>> import numpyro.distributions as dist
    >>> import numpyro_ebm as ebm
    >>> def gaussian(data):
    ...     precision = numpyro.param("precision", 1.0, constraint=dist.constraints.positive)
    ...     with numpyro.plate("data", len(data)):
    ...         v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
    ...         ebm.energy("E", 0.5 * precision * v**2)
    >>> data = 0.5 * jax.random.normal(jax.random.key(0), (5_000,))
    >>> objective = ebm.NCE(dist.Normal(0, 1))
    >>> svi = ebm.EnergySVI(gaussian, None, optax.adam(0.03), objective)
    >>> fit = svi.run(jax.random.key(1), 500, data, progress_bar=False)
    >>> log_z = objective.log_normalizer(jax.random.key(2), fit.params, gaussian, None, data)
    >>> exact = 0.5 * jax.numpy.log(2 * jax.numpy.pi / fit.params["precision"])
    >>> bool(abs(log_z.value - exact) < 4 * log_z.mcse)
    True
    """

    needs = "bound"
    method = "NCE"  # how log Z was found
    far_noise = "almost every point is told apart without doubt, the loss is flat"

    def __init__(
        self,
        noise: Any,
        noise_ratio: int = 1,
        marginal: Marginal | None = None,
        *,
        noise_optim: Optimizer | None = None,
        num_noise_steps: int = 1,
        init_log_normalizer: float | None = None,
    ):
        super().__init__(noise, noise_ratio, marginal)
        if init_log_normalizer is not None:
            check_finite(type(self).__name__, init_log_normalizer=init_log_normalizer)
        self.init_log_normalizer = init_log_normalizer
        check_integer(type(self).__name__, num_noise_steps=num_noise_steps)
        if noise_optim is not None and (
            isinstance(noise, dist.Distribution) or not callable(noise)
        ):
            raise ModelError(
                f"{type(self).__name__}: `noise_optim` is given, and this noise has no parameters "
                "to train. Declare them with `numpyro.param` in a function that returns the noise."
            )
        # A NumPyro distribution is callable as well.
        if callable(noise) and not isinstance(noise, dist.Distribution):
            self.networks = (
                AuxiliaryNetwork(
                    "noise", self._noise_parameters, _fit_noise(self), noise_optim, num_noise_steps
                ),
            )

    def check_sites(self, row_model: RowModel) -> None:
        super().check_sites(row_model)
        check_rows_alike(
            row_model,
            f"{type(self).__name__} learns one log Z for all rows",
            "Use RankingNCE, ConditionalNCE, or a score-based objective such as "
            "DenoisingScoreMatching.",
        )

        if LOG_NORMALIZER in row_model.parameters and _reads(row_model, LOG_NORMALIZER):
            raise ModelError(
                f"The model's parameter '{LOG_NORMALIZER}' is part of its energy, and "
                f"{type(self).__name__} calls its own log Z so; rename the model's."
            )

    def _noise_parameters(self, rng_key, problem):
        return self.read_noise(problem.row_model).parameters(rng_key)

    def noise_distribution(self, params: Params, model: Model, *args: Any, **kwargs: Any) -> Any:
        """The noise as it is at given parameters, to draw from and to evaluate.

        :param dict params: learned parameters, as a run of :class:`~numpyro_ebm.EnergySVI` returns
            them.
        :param model: the model.
        :param args: arguments of the model.
        :param kwargs: keyword arguments of the model.
        :return: what the noise was written as, with its trained parameters: a distribution, a dict
            of distributions by site name, or a flow; ``None`` for a function that samples the sites
            itself, which serves with ``numpyro.handlers.substitute(noise, data=params)``.
        """
        return self.read_noise(read_model(model, args, kwargs, params)).distribution(params)

    def own_parameters(
        self, rng_key: jax.Array, params: Params, problem: Problem
    ) -> dict[str, tuple[Any, Any]]:
        if LOG_NORMALIZER in params:
            return {LOG_NORMALIZER: (params[LOG_NORMALIZER], constraints.real)}
        if self.init_log_normalizer is not None:
            return {
                LOG_NORMALIZER: (jnp.asarray(self.init_log_normalizer, float), constraints.real)
            }
        _, at_noise = self.contrast(rng_key, params, problem)
        start = logsumexp(at_noise) - math.log(at_noise.size)
        return {LOG_NORMALIZER: (start, constraints.real)}

    def energy_loss(self, rng_key: jax.Array, params: Params, problem: Problem) -> jax.Array:
        at_data, at_noise = self.contrast(rng_key, params, problem)
        return problem.row_model.mean(self._rows(params, at_data, at_noise))

    def _rows(self, params, at_data, at_noise):
        shift = params[LOG_NORMALIZER] + math.log(self.noise_ratio)
        return softplus(shift - at_data) + jnp.sum(softplus(at_noise - shift), 0)

    def overlap(self, rng_key: jax.Array, params: Params, problem: Problem) -> jax.Array:
        """How much noise and data mix, between 0 (told apart without error) and 1 (the same)."""
        at_data, at_noise = self.contrast(rng_key, params, problem)
        shift = params[LOG_NORMALIZER] + math.log(self.noise_ratio)
        doubt = lambda x: sigmoid(x - shift) * sigmoid(shift - x)  # noqa: E731
        mean = problem.row_model.mean
        mixed = mean(doubt(at_data)) + self.noise_ratio * mean(doubt(at_noise))
        return mixed / mean(jnp.ones_like(at_data)) * (1 + self.noise_ratio) / self.noise_ratio

    def statistics(
        self, rng_key: jax.Array, params: Params, problem: Problem, state: Any = None
    ) -> Any:
        return self.overlap(rng_key, params, problem)

    def review(self, statistics: Any) -> None:
        warn_if_apart(
            type(self).__name__,
            statistics,
            "the noise is far from the data",
            f"{self.far_noise}, and log Z and the parameters are hardly determined. Choose a noise "
            "closer to the data (a fitted Gaussian, a flow), or FlowContrastive, ConditionalNCE or "
            "a score-based objective.",
        )

    def log_normalizer(
        self,
        rng_key: jax.Array,
        params: Params,
        model: Model,
        guide: Model | None = None,
        *args: Any,
        parameters_known: bool = False,
        **kwargs: Any,
    ) -> LogNormalizer:
        r"""The learned log Z with its standard error.

        The error is that of :math:`\widehat{\log Z} - \log Z(\hat θ)`, from the sandwich covariance
        of all parameters learned together on these rows and as many fresh noise draws:

        .. math:: g^\top J^{-1} S J^{-\top} g / n, \qquad g = (-E\,∂_θ \log\tilde p,\ 1)

        with J the Hessian of the loss and S the covariance of its gradient over rows; where
        training has stopped more than three standard errors before the optimum of these rows, the
        Newton step that is left counts as well.

        :param rng_key: random key.
        :param dict params: learned parameters, ``log_normalizer`` among them.
        :param model: the model.
        :param guide: the guide, for ``ImportanceBound``.
        :param args: arguments of the model, with the rows that were learned from.
        :param bool parameters_known: take θ as given and only log Z as learned, which needs no
            covariance of all parameters.
        :param kwargs: keyword arguments of the model.
        :return: :class:`~numpyro_ebm.log_normalizers.LogNormalizer`; its ``ess`` is that of the
            noise draws as importance samples of the model.
        :raises ModelError: if ``params`` lacks ``log_normalizer``, or there are more parameters
            than a covariance can be inverted for.
        """
        if LOG_NORMALIZER not in params:
            raise ModelError(
                f"`params` lacks '{LOG_NORMALIZER}', the log Z that {type(self).__name__} learns."
            )
        key_prepare, key_draw = jax.random.split(rng_key)
        read_once = self.prepare(key_prepare, params, model, guide, args, kwargs)
        learned = {LOG_NORMALIZER}
        if not parameters_known:
            learned |= {name for name in read_once.row_model.parameters if name in params}
        own = jax.tree.map(jnp.asarray, {name: params[name] for name in sorted(learned)})
        flat, unravel = ravel_pytree(own)
        if flat.size > MOST_PARAMETERS:
            raise ModelError(
                f"The standard error needs the covariance of {flat.size} parameters. Pass "
                "`parameters_known=True` for the error of log Z at the given parameters."
            )

        @jax.jit
        def moments(flat):
            problem = self.prepare(key_prepare, params, model, guide, args, kwargs)

            def contrast(flat):
                return self.contrast(key_draw, {**params, **unravel(flat)}, problem)

            def rows(flat):
                rows = self._rows({**params, **unravel(flat)}, *contrast(flat))
                return problem.row_model.weigh(rows)

            def log_model(flat):
                mean = problem.row_model.mean
                at_data, _ = contrast(flat)
                return mean(at_data) / mean(jnp.ones_like(at_data))

            gradients = jax.jacfwd(rows)(flat)
            hessian = jax.jacfwd(jax.grad(lambda x: jnp.mean(rows(x))))(flat)
            to_model = jax.grad(log_model)(flat)
            direction = jax.grad(lambda x: unravel(x)[LOG_NORMALIZER])(flat) - to_model
            # Parameters in units of their own curvature, so that the cut of pinv means the same.
            unit = 1.0 / jnp.sqrt(jnp.maximum(jnp.abs(jnp.diag(hessian)), 1e-30))
            solve = unit[:, None] * jnp.linalg.pinv(unit[:, None] * hessian * unit) * unit
            influence = gradients @ solve @ direction
            num, step = influence.shape[0], jnp.mean(influence)
            variance = jnp.sum((influence - step) ** 2) / (num * (num - 1))
            # What is left of the way to the optimum of these rows counts, if it is more than noise.
            mcse = jnp.sqrt(variance + jnp.where(step**2 > 9.0 * variance, step**2, 0.0))
            return mcse, contrast(flat)[1], self.overlap(key_draw, params, problem)

        mcse, at_noise, overlap = moments(flat)
        self.review(overlap)
        ess = jnp.exp(2 * logsumexp(at_noise) - logsumexp(2 * at_noise))
        return LogNormalizer(params[LOG_NORMALIZER], mcse, ess, self.method)


def _reads(row_model, name):
    """Whether the row log-joint depends on a parameter."""
    latent = {site.name: site.value for site in row_model.latent.values()}

    def density(**value):
        params = {**row_model.parameters, **value}
        return row_model.log_density(params, {**row_model.visible_values, **latent})

    return name in eval_provenance(density, **{name: jnp.asarray(row_model.parameters[name])})


def _fit_noise(objective):
    """The loss of a noise with parameters: minus the log-likelihood of the data."""

    def loss(rng_key, params, own, problem):
        noise = objective.read_noise(problem.row_model)
        rows = noise.log_density({**params, **own}, problem.unconstrained)
        return -problem.row_model.mean(rows)

    return loss
