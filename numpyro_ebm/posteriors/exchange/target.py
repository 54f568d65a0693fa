# SPDX-License-Identifier: Apache-2.0
r"""A doubly intractable posterior as functions of arrays, for :class:`~numpyro_ebm.Exchange`.

.. math:: π(θ \mid x) \propto π(θ) \prod_n \frac{\tilde p(x_n; θ)}{Z_n(θ)}

The parameters are flattened to (groups, dimension) in NumPyro's unconstrained coordinates: one
group, or a group for every row of the data plate where the rows have parameters of their own.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.special import logsumexp
from numpyro.distributions import biject_to
from numpyro.handlers import seed, substitute, trace
from numpyro.infer.util import constrain_fn, potential_energy

from numpyro_ebm._compat import GIBBS_SITES_KWARG, unconstrain_fn
from numpyro_ebm.errors import ModelError
from numpyro_ebm.keys import default_key
from numpyro_ebm.marginals import exact_marginal
from numpyro_ebm.model.obs_masks import RowsObserved
from numpyro_ebm.model.priors import UnsetParams, prior_part, read_with_priors
from numpyro_ebm.model.row_site import placeholder
from numpyro_ebm.posteriors.exchange.repeat import (
    NOT_THE_SAME,
    CountedOnce,
    check_repeated,
    repeat_rows,
)
from numpyro_ebm.samplers.positions import flatten_sites, unflatten_sites
from numpyro_ebm.types import Model, Params, SiteValues

__all__ = ["ExchangeTarget", "complete_prior"]


def complete_prior(model: Model, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> Model:
    """The prior part of a model, with placeholders on sites without a value."""
    row_model = read_with_priors(model, args, {} if kwargs is None else kwargs, "Exchange")
    prior = seed(prior_part(model, row_model.plate), default_key())
    return substitute(prior, substitute_fn=placeholder)


class ExchangeTarget:
    """A model with priors, read for the exchange algorithm.

    - **row_model** - the rows.
    - **prior** - the priors, an ordinary NumPyro model of the same arguments.
    - **constants** - values of the `param` sites.

    :param model: a model with energy statements.
    :param tuple args: its arguments.
    :param dict kwargs: its keyword arguments.
    :param bool by_row: whether every row has parameters of its own.
    :raises ModelError: if there is no posterior, or none for the exchange algorithm to sample.
    """

    def __init__(
        self,
        model: Model,
        args: tuple[Any, ...],
        kwargs: dict[str, Any] | None,
        by_row: bool = False,
    ):
        self.model, self.args = model, args
        self.kwargs = {} if kwargs is None else kwargs
        self.by_row = by_row
        unset = UnsetParams(model)
        self.row_model = read_with_priors(unset, args, self.kwargs, "Exchange")
        read: Any = self.row_model.model
        if isinstance(read, RowsObserved):  # around `unset`
            self.model = RowsObserved(model, read.name)
        self.row_model.model = self.model
        if self.row_model.row_weights is not None:
            self._count_rows()
        row_model = self.row_model
        self.prior = prior_part(model, row_model.plate)
        self.constants = {
            k: x for k, x in row_model.parameters.items() if k not in row_model.priors
        }
        self._check(unset.names)
        self.marginal = self._marginal()

    @property
    def num_groups(self) -> int:
        return self.row_model.num_rows if self.by_row else 1

    @property
    def data(self) -> SiteValues:
        """The observed values of the visible sites."""
        return self.row_model.visible_values

    # Parameters

    def flatten(self, z: SiteValues) -> jax.Array:
        """A dict of unconstrained values as an array of shape (groups, dimension)."""
        return flatten_sites(self._by_group(z), sorted(z))[0]

    def unflatten(self, flat: jax.Array, like: SiteValues) -> SiteValues:
        """Undo :meth:`flatten`; ``like`` has the shapes and types."""
        z = unflatten_sites(flat, self._by_group(like), sorted(like))
        return {k: jnp.reshape(x, like[k].shape).astype(like[k].dtype) for k, x in z.items()}

    def _by_group(self, z):
        return z if self.by_row else {name: x[None] for name, x in z.items()}

    def constrain(self, z: SiteValues) -> SiteValues:
        """Values of the parameters on their supports."""
        return constrain_fn(self.prior, self.args, self.kwargs, z)

    def unconstrain(self, values: SiteValues) -> SiteValues:
        """Undo :meth:`constrain`."""
        return unconstrain_fn(self.prior, self.args, self.kwargs, values)

    def log_prior(self, z: SiteValues) -> jax.Array:
        """log π(θ) in unconstrained coordinates, log-Jacobian included, of shape (groups,)."""
        if not self.by_row:
            energy: Any = potential_energy(self.prior, self.args, self.kwargs, z)
            return -energy[None]
        values = self.constrain(z)
        prepared = substitute(seed(self.prior, default_key()), data=values)
        model_trace = trace(prepared).get_trace(*self.args, **self.kwargs)
        total = jnp.zeros(self.num_groups)
        for name in z:
            fn = model_trace[name]["fn"]
            transform = biject_to(fn.support)
            jacobian = transform.log_abs_det_jacobian(z[name], values[name])
            for term in (fn.log_prob(values[name]), jacobian):
                term = jnp.broadcast_to(term, (self.num_groups, *jnp.shape(term)[1:]))
                total = total + jnp.sum(jnp.reshape(term, (self.num_groups, -1)), -1)
        return total

    # Rows

    def log_rows(self, params: Params, values: SiteValues) -> jax.Array:
        """log p̃ of every row, (rows,): of the visible sites, and of latent ones if given."""
        params = {**self.constants, **params}
        if any(name in values for name in self.row_model.latent):
            return self.row_model.log_density(params, values)
        return self.marginal.log_density(self.row_model, params, values)

    def log_density(self, z: SiteValues, values: SiteValues) -> jax.Array:
        """log p̃ of a data set, (groups,)."""
        return self.group(self.log_rows(self.constrain(z), values))

    def coordinates(self, values: SiteValues) -> jax.Array:
        """A data set in unconstrained coordinates, (rows, coordinates)."""
        sites = self.row_model.visible
        return self.row_model.flatten(
            {
                name: jnp.asarray(
                    values[name] if site.is_unconstrained else site.transform.inv(values[name]),
                    jnp.result_type(float),
                )
                for name, site in sites.items()
            }
        )

    def group_mean(self, x: jax.Array) -> jax.Array:
        """Means of an array of shape (rows, coordinates) over each group, (groups,)."""
        return jnp.mean(x, -1) if self.by_row else jnp.mean(x)[None]

    def group(self, rows: jax.Array) -> jax.Array:
        """Sums of an array of shape (rows,) over the rows of each group."""
        rows = self.row_model.weigh(rows)
        return rows if self.by_row else jnp.sum(rows)[None]

    def log_posterior(
        self, z: SiteValues, references: SiteValues, baselines: jax.Array
    ) -> jax.Array:
        r"""The log-posterior with Z estimated from fictitious data sets, of shape (groups,).

        .. math:: \log\frac{Z(θ)}{Z(\hat θ)} ≈
            \log \frac{1}{K}\sum_k \frac{\tilde p(u_k; θ)}{\tilde p(u_k; \hat θ)}

        row by row where Z differs from row to row, else with the rows of all data sets together.

        :param references: data sets u_k drawn at θ̂, K leading.
        :param baselines: log p̃(u_k; θ̂), (K, rows).
        """
        params = self.constrain(z)
        ratios = jax.vmap(lambda values: self.log_rows(params, values))(references) - baselines
        if self.by_row or self.row_model.covariates:
            log_z = self.group(logsumexp(ratios, 0))
        else:
            log_z = self.group(jnp.full(self.row_model.num_rows, logsumexp(ratios)))
        return self.log_prior(z) + self.group(self.log_rows(params, self.data)) - log_z

    # Checks

    def _count_rows(self):
        """Repeat rows that count more than once, and leave weights of 0 and 1 to `group`."""
        row_model, plate = self.row_model, self.row_model.plate
        self.model = CountedOnce(self.model, plate)
        row_model.model = self.model
        found = repeat_rows(row_model, self.args, self.kwargs)
        if found is None:
            return
        if self.by_row:
            raise ModelError(
                "Exchange(by_row=True): every row has parameters of its own, and some rows have "
                "weights above 1 (`handlers.scale`). Give the rows the weight 1."
            )
        indices, self.args, self.kwargs = found
        try:
            self.row_model = read_with_priors(self.model, self.args, self.kwargs, "Exchange")
        except ModelError as error:  # it was read at the rows themselves
            raise ModelError(NOT_THE_SAME) from error
        check_repeated(row_model, self.row_model, indices)

    def _check(self, unset):
        row_model = self.row_model
        if unset:
            names = sorted(unset)
            raise ModelError(
                f"Exchange: the `numpyro.param` site(s) {names} have no prior and no value. Give "
                "them priors, `numpyro.sample(...)`, or hold them: "
                f'`numpyro.handlers.substitute(model, data={{"{names[0]}": ...}})`.'
            )
        discrete = [name for name, fn in row_model.priors.items() if fn.support.is_discrete]
        if discrete:
            raise ModelError(
                f"Exchange: the parameter(s) {discrete} are discrete, and it moves continuous "
                "ones. Draw them in another block of `numpyro.infer.Gibbs`, `(DiscreteGibbs(m), "
                f"{discrete})` with `m = given(model, [...])`, or sum them out by hand."
            )
        if row_model.num_rows != row_model.total_rows:
            raise ModelError(
                f"Exchange: the plate '{row_model.plate}' subsamples {row_model.num_rows} of its "
                f"{row_model.total_rows} rows, and the ratio of acceptance needs all of them. Drop "
                "`subsample_size`."
            )
        if not row_model.visible:
            raise ModelError("Exchange: the model observes nothing inside its data plate.")
        if self.by_row:
            for name, fn in row_model.priors.items():
                shape = fn.shape()
                if not fn.batch_shape or shape[0] != row_model.num_rows:
                    raise ModelError(
                        f"Exchange(by_row=True): the parameter '{name}' has shape {shape}, and a "
                        f"value for each of the {row_model.num_rows} rows should lead. Draw it "
                        "in a "
                        'plate of that size, `with numpyro.plate("groups", '
                        f"{row_model.num_rows})`, or "
                        "give it to another block of `Gibbs`."
                    )

    def _marginal(self):
        row_model = self.row_model
        try:
            return exact_marginal(row_model)
        except ModelError as error:
            names, params = sorted(row_model.latent), sorted(row_model.priors)
            raise ModelError(
                f"Exchange: the latent site(s) {names} cannot be summed out of the ratio. Draw "
                f"them in another block, which conditions them here: `m = given(model, {params})`, "
                f"`numpyro.infer.Gibbs([(Exchange(m, ...), {params}), (BlockGibbs(m), {names})])`, "
                f"with the kernel that suits them. ({error})"
            ) from None

    @property
    def conditioned(self) -> tuple[Any, Any]:
        """Values that an enclosing ``Gibbs`` conditions the model on, and the other arguments."""
        others = {k: x for k, x in self.kwargs.items() if k != GIBBS_SITES_KWARG}
        return self.kwargs.get(GIBBS_SITES_KWARG, {}), others
