# SPDX-License-Identifier: Apache-2.0
r"""Exact posteriors of an energy's parameters, where log Z(θ) can be computed.

.. math:: π(θ \mid v) \propto π(θ) \prod_n \frac{\tilde p(v_n; θ)}{Z(θ)}
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import lax
from jax.typing import ArrayLike
from numpyro.handlers import scale

from numpyro_ebm.errors import ImproperSamplingError, ModelError, check_integer
from numpyro_ebm.inputs import as_arrays
from numpyro_ebm.language.primitives import always_observed
from numpyro_ebm.log_normalizers.methods import METHODS
from numpyro_ebm.marginals import ExactMarginal, exact_marginal
from numpyro_ebm.model.enumerated_values import EnumeratedValues
from numpyro_ebm.model.priors import data_plate, isolated, read_with_priors, run_prior
from numpyro_ebm.model.reading import read_model
from numpyro_ebm.model.row_analysis import check_rows_alike
from numpyro_ebm.signatures import Checked
from numpyro_ebm.types import Model, Params

__all__ = ["NormalizedRow", "normalized"]

OF_PARAMETERS = {
    name: method.of_parameters
    for name, method in METHODS.items()
    if method.of_parameters is not None
}
"""The methods that give log Z as a function of the parameters."""


class normalized(Checked):
    r"""Give a model its log Z(θ): an ordinary NumPyro model with the exact posterior.

    .. math:: \log p(v_n \mid θ) = \log \tilde p(v_n; θ) - \log Z(θ)

    Parameters with priors may then be inferred by anything NumPyro has: ``NUTS``, ``SVI`` with
    AutoGuides or an ELBO, ``Predictive``, ``log_likelihood``, ``az.loo``. Discrete latent sites are
    summed out of :math:`\tilde p`; continuous ones stay in the model, to be sampled along with θ,
    unless a ``marginal`` integrates them out.
    The first visible site carries the log-likelihood of the row.

    :param model: a NumPyro model with energy statements and priors on its parameters.
    :param log_normalizer: log Z of one row. ``"enumerate"``: discrete sites counted or summed in
        closed form, real sites in which the energy is quadratic integrated in closed form.
        ``"quadrature"``: one or two real visible coordinates, discrete ones counted, on nodes
        around the data. A function: maps the dict of parameters to log Z, a scalar or one value for
        each row; :func:`~numpyro_ebm.emulate_log_normalizer` makes one where Z has no closed form.
    :param marginal: an exact marginal that integrates the latent sites out of :math:`\tilde p`,
        such as :class:`~numpyro_ebm.GaussianLatents`.
    :param int num_nodes: quadrature nodes for each real coordinate.
    :param int max_states: the most states that are enumerated.
    :return: a NumPyro model with the same arguments.
    :raises ModelError: if ``log_normalizer`` is none of these; when run, if no parameter has a
        prior or a prior is improper, if the method does not apply to the model (it says why), or a
        function returns another shape.

    A function with an attribute ``mcse``, the standard error of log Z at given parameters, adds the
    site ``log_normalizer_error``: the standard error s, in nats, of the log-likelihood of all rows.
    The density then has the factor :math:`e^{-s^2/2}`, that of the harmonic mean over what the
    likelihood may be: nearly one where s is small, and against wandering off to where an emulator
    guesses.

    **Example**

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import numpyro
    >>> import numpyro.distributions as dist
    >>> from numpyro.infer import MCMC, NUTS
    >>> import numpyro_ebm as ebm
    >>> def gaussian(data):
    ...     precision = numpyro.sample("precision", dist.Gamma(2.0, 1.0))
    ...     with numpyro.plate("data", len(data)):
    ...         v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
    ...         ebm.energy("E", 0.5 * precision * v**2)
    >>> data = jax.random.normal(jax.random.key(0), (200,))
    >>> model = ebm.normalized(gaussian, "enumerate")  # or lambda params: log Z(params)
    >>> mcmc = MCMC(NUTS(model), num_warmup=300, num_samples=1_000, progress_bar=False)
    >>> mcmc.run(jax.random.key(1), data)
    >>> exact = (2 + 100) / (1 + jnp.sum(data**2) / 2)  # the posterior is a Gamma
    >>> bool(abs(mcmc.get_samples()["precision"].mean() / exact - 1) < 0.02)
    True
    """

    posterior_kind = "likelihood"  # for `to_arviz`

    def __init__(
        self,
        model: Model,
        log_normalizer: Literal["enumerate", "quadrature"]
        | Callable[[Params], ArrayLike] = "enumerate",
        *,
        marginal: ExactMarginal | None = None,
        num_nodes: int = 256,
        max_states: int = 1_048_576,
    ):
        if not callable(log_normalizer) and log_normalizer not in OF_PARAMETERS:
            raise ModelError(
                "normalized: `log_normalizer` must be a function of the parameters, "
                f"{' or '.join(map(repr, OF_PARAMETERS))}, got {log_normalizer!r}."
            )
        if marginal is not None and not isinstance(marginal, ExactMarginal):
            raise ModelError(
                "normalized: `marginal` must be an exact one, such as `GaussianLatents()`, got "
                f"{marginal!r}."
            )
        check_integer("normalized", 4, num_nodes=num_nodes)
        self.model = model
        self.log_normalizer = log_normalizer
        self._marginal = marginal
        check_integer("normalized", max_states=max_states)
        self._num_nodes, self._max_states = num_nodes, max_states

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        args, kwargs = as_arrays(args, kwargs)
        model = self.model
        row_model = read_with_priors(model, args, kwargs, "normalized")
        if not row_model.visible:
            raise ModelError(
                "normalized: the model has no observed site, so the posterior of its parameters is "
                "their prior. Pass the data, and give it as `obs=` to the visible sites."
            )
        kept = []
        if self._marginal is None:
            kept = [name for name, site in row_model.latent.items() if not site.is_discrete]
        params, latent, indices = run_prior(model, args, kwargs, row_model.plate, kept)
        params = {name: params[name] for name in row_model.parameters}
        values = EnumeratedValues.find({**params, **latent}, row_model, "normalized")
        with isolated():
            if row_model.num_rows != row_model.total_rows:  # the rows of this subsample
                own = {name: values.one[name] for name in row_model.parameters}
                at = {**own, row_model.plate: indices}
                row_model = read_model(model, args, kwargs, at)
            rows, variance = values.map(partial(self._rows, row_model))
        _observe(row_model, indices, values, rows)
        if variance is not None:
            variance = values.place(variance)
            numpyro.deterministic("log_normalizer_error", jnp.sqrt(variance))
            numpyro.factor("log_normalizer_doubt", -0.5 * variance)

    def _rows(self, row_model, values):
        """Log-likelihood of the rows, and the variance of their sum if Z is an estimate."""
        params = {name: values[name] for name in row_model.parameters}
        latent = {name: values[name] for name in row_model.latent if name in values}
        log_z = self._log_z(row_model, params)
        rows = self._log_density(row_model, params, latent) - log_z
        mcse = getattr(self.log_normalizer, "mcse", None)
        if mcse is None:
            return rows, None
        times: Any = row_model.weigh(jnp.ones(row_model.num_rows))
        times = row_model.total_rows * jnp.mean(times) if jnp.ndim(log_z) == 0 else times
        return rows, jnp.sum((times * mcse(params)) ** 2)

    def _log_z(self, row_model, params):
        if callable(self.log_normalizer):
            try:
                log_z = jnp.asarray(self.log_normalizer(params))
            except KeyError as error:
                raise ModelError(
                    f"normalized: `log_normalizer` asked for {error}, and there is no parameter "
                    f"{error}: it is given {sorted(params)}."
                ) from error
            if jnp.shape(log_z) not in ((), (row_model.num_rows,)):
                raise ModelError(
                    "normalized: `log_normalizer` returned an array of shape "
                    f"{jnp.shape(log_z)}; log Z is a scalar, or one value for each of the "
                    f"{row_model.num_rows} rows."
                )
            if jnp.shape(log_z) == () and row_model.num_rows > 1:
                check_rows_alike(
                    row_model,
                    "normalized: `log_normalizer` returned one number for all rows",
                    f"Return an array of shape ({row_model.num_rows},).",
                )
            return log_z
        return OF_PARAMETERS[self.log_normalizer](
            row_model, params, self._num_nodes, self._max_states
        )

    def _log_density(self, row_model, params, latent):
        """log p̃ of every row, without the base measure of the sites that stay in the model."""
        values = {**row_model.visible_values, **latent}
        rest = row_model.with_latent([name for name in row_model.latent if name not in latent])
        marginal = exact_marginal(rest) if self._marginal is None else self._marginal
        marginal.check(rest, None, 1)
        total = marginal.log_density(rest, params, values)
        total = total - row_model.log_reference(row_model.visible_values)
        if not latent:
            return total
        placeholders = {name: site.value for name, site in rest.latent.items()}
        terms = row_model.terms({**params, **values, **placeholders})
        return total - sum(terms[name] for name in latent) + row_model.log_reference(latent)


class NormalizedRow(dist.Distribution):
    """Distribution of a visible site of a :class:`normalized` model, at its observed value.

    Made by :class:`normalized`; not a distribution to write into a model.

    :param rows: the log-likelihood of the rows; axes left of the plates are enumerated.
    :param fn: the base measure of the site.
    """

    pytree_data_fields = ("rows", "_support")
    arg_constraints = {}

    def __init__(self, rows: jax.Array, fn: Any, *, validate_args: bool | None = None):
        self.rows, self._support = rows, fn.support
        batch_shape: Any = lax.broadcast_shapes(jnp.shape(rows), fn.batch_shape)
        super().__init__(batch_shape, fn.event_shape, validate_args=validate_args)

    @dist.constraints.dependent_property
    def support(self) -> Any:
        return self._support

    def log_prob(self, value: ArrayLike, intermediates: Any = None) -> jax.Array:
        return self.rows

    def sample(self, key: jax.Array | None, sample_shape: tuple[int, ...] = ()) -> jax.Array:
        raise ImproperSamplingError(
            "A visible site of a `normalized` model has a log-likelihood and no draws. Draw rows "
            "at given parameters with "
            "`numpyro_ebm.sample(rng_key, fixed(model, params), num_samples)`."
        )


def _observe(row_model, indices, values, rows):
    """Add the log-likelihood of the rows to the model, scaled and masked as in the model."""
    weighted: Any = nullcontext()
    if row_model.row_weights is not None:
        counts = row_model.row_weights > 0
        rows = jnp.where(counts, rows, 0.0)
        weights = jnp.where(counts, row_model.row_weights, 1.0)  # NumPyro's scales are positive
        weighted = scale(scale=jnp.reshape(weights, (-1,) + (1,) * (-1 - row_model.dim)))
    with data_plate(row_model, indices), weighted, always_observed():
        if any(len(site.dims) > 1 + site.event_dim for site in row_model.visible.values()):
            # Sites of further plates do not have one value a row.
            numpyro.factor(row_model.energies[0], values.place(rows, row_model.dim))
            return
        for i, (name, site) in enumerate(row_model.visible.items()):
            mine = values.place(rows if i == 0 else jnp.zeros_like(rows), row_model.dim)
            numpyro.sample(name, NormalizedRow(mine, site.fn), obs=site.value)
