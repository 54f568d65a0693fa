# SPDX-License-Identifier: Apache-2.0
r"""An ordinary NumPyro model, without an energy statement, as what a kernel moves.

.. math:: \log p(z) = -U(z)

with U NumPyro's potential energy of all latent sites in unconstrained coordinates z, discrete sites
summed out by its enumeration. Their joint density does not fall into rows: to a kernel it is one
row, that has the part of the interface of :class:`~numpyro_ebm.model.row_model.RowModel` that
kernels use.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from numpyro.handlers import block, seed, substitute, trace
from numpyro.infer.util import constrain_fn, initialize_model, potential_energy
from numpyro.primitives import Messenger

from numpyro_ebm._compat import eval_provenance, unconstrain_fn
from numpyro_ebm.errors import ModelError
from numpyro_ebm.keys import default_key
from numpyro_ebm.language.sites import is_energy, log_prob_of, obs_masked
from numpyro_ebm.model.reference import Completed
from numpyro_ebm.model.row_site import RowSite, placeholder
from numpyro_ebm.samplers.positions import flatten_sites
from numpyro_ebm.types import Model, Params, SiteValues, Trace

__all__ = ["PlainModel", "read_plain_model", "states_energy"]


def read_plain_model(
    model: Model, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
) -> "PlainModel | None":
    """Read a NumPyro model; ``None`` if it states an energy, and so has rows.

    :param model: a NumPyro model; a posterior of parameters, by ``normalized`` or ``generalized``,
        is one.
    :param tuple args: its arguments.
    :param dict kwargs: its keyword arguments.
    :raises ModelError: if no continuous site is latent, or a plate is subsampled.
    """
    kwargs = {} if kwargs is None else kwargs
    sites = _sites_without_energy(model, args, kwargs)
    return None if sites is None else PlainModel(model, args, kwargs, sites)


def states_energy(model: Model, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a NumPyro model states an energy where the handlers around it see it."""
    return _sites_without_energy(model, args, kwargs) is None


def _sites_without_energy(model, args, kwargs):
    """A trace of a model; `None` if it states an energy."""
    prepared = substitute(seed(model, default_key()), substitute_fn=placeholder)
    try:
        return trace(_StopAtEnergy(prepared)).get_trace(*args, **kwargs)
    except _EnergyFound:
        return None


class PlainModel:
    """A NumPyro model as a row model of one row.

    - **visible** - continuous latent sites by name, which a kernel moves.
    - **summed** - names of the discrete ones.
    - **observed** - names of observed sites and factors.

    :param model: the model.
    :param args, kwargs: its arguments.
    :param sites: a trace of it.
    """

    num_rows, rows_shape, unit = 1, (), "chains"
    latent: dict[str, RowSite] = {}

    def __init__(self, model: Model, args: tuple[Any, ...], kwargs: dict[str, Any], sites: Trace):
        self.args, self.kwargs = args, kwargs
        samples = {name: site for name, site in sites.items() if site["type"] == "sample"}
        latent = {k: RowSite.of(s) for k, s in samples.items() if not s["is_observed"]}
        self.visible = {k: site for k, site in latent.items() if not site.is_discrete}
        self.summed = {k: site.value for k, site in latent.items() if site.is_discrete}
        self.observed = [name for name, site in samples.items() if site["is_observed"]]
        self._check(sites)
        held = {k: s["value"] for k, s in sites.items() if s["type"] in ("param", "mutable")}
        self._model = substitute(model, data=held)
        self._seeded = seed(self._model, default_key())
        masked = [name for name in obs_masked(sites) if name in self.visible]
        self._density: Model = _Complete(self._seeded, masked) if masked else self._seeded
        if self.summed:
            from numpyro.contrib.funsor import config_enumerate, enum

            frames = [frame for site in samples.values() for frame in site["cond_indep_stack"]]
            nesting = max((-frame.dim for frame in frames), default=0)
            self._density = enum(config_enumerate(self._density), -nesting - 1)

    def _check(self, sites):
        if not self.visible:
            found = f", only discrete ones, {sorted(self.summed)}" if self.summed else ""
            raise ModelError(
                f"The model has no continuous latent site to move{found}. Discrete sites are drawn "
                "by `numpyro.infer.DiscreteGibbs`."
            )
        for name, site in sites.items():
            size, subsample_size = site["args"] if site["type"] == "plate" else (None, None)
            if subsample_size not in (None, size):
                raise ModelError(
                    f"The plate '{name}' is subsampled ({subsample_size} of {size}), and a chain "
                    "needs the density of all. Leave `subsample_size` out, or use "
                    "`numpyro.infer.HMCECS`, which corrects for it."
                )

    @property
    def sites(self) -> dict[str, RowSite]:
        """The sites that a kernel moves."""
        return self.visible

    def log_density(self, rows: SiteValues) -> jax.Array:
        """log p(z) of unconstrained values with an axis of rows, (1,)."""
        z = self.from_rows(rows)
        enumerates = bool(self.summed)
        energy = potential_energy(self._density, self.args, self.kwargs, z, enum=enumerates)
        return -jnp.reshape(energy, (1,))

    def log_density_at(self, values: SiteValues) -> jax.Array:
        """log p(z) at values on the supports, a scalar."""
        z = unconstrain_fn(self._seeded, self.args, self.kwargs, values)
        return self.log_density(self.to_rows(z))[0]

    def without_data(self, model: Model) -> Model:
        """The model without its observed sites and factors: what is left is its prior.

        :raises ModelError: if there are none.
        """
        if not self.observed:
            raise ModelError(
                "The model has no energy, no observed site and no factor, so that there is nothing "
                "to temper. State what is rough about its density by `numpyro.factor`, over sites "
                "with a proper or a flat prior, or use another kernel."
            )
        return block(model, hide=self.observed)

    def start(self, rng_key: jax.Array, init_strategy: Callable[..., Any]) -> SiteValues:
        """Initial unconstrained values: NumPyro's, drawn until the density is finite."""
        found = initialize_model(
            rng_key,
            self._model,
            init_strategy=init_strategy,
            model_args=self.args,
            model_kwargs=self.kwargs,
        )
        return found.param_info.z

    def unconstrain(self, values: SiteValues) -> SiteValues:
        """Unconstrained values of values on the supports."""
        return unconstrain_fn(self._seeded, self.args, self.kwargs, values)

    def constrain(self, z: SiteValues) -> tuple[SiteValues, None]:
        """Values on the supports; the log-Jacobian is part of :meth:`log_density`."""
        return constrain_fn(self._seeded, self.args, self.kwargs, z), None

    def deterministic(self, params: Params, values: SiteValues) -> SiteValues:
        """The `deterministic` sites, but for those that read a site that is summed out."""

        def replay(**summed):
            sites = self._trace_at({**values, **summed})
            return {
                k: site["value"] for k, site in sites.items() if site["type"] == "deterministic"
            }

        depends = eval_provenance(replay, **self.summed)
        return {k: x for k, x in replay(**self.summed).items() if not depends[k]}

    def terms(self, values: SiteValues) -> dict[str, jax.Array]:
        """Log-densities by site."""
        sites = self._trace_at(values)
        return {k: log_prob_of(site) for k, site in sites.items() if site["type"] == "sample"}

    def _trace_at(self, values):
        return trace(substitute(self._seeded, data=values)).get_trace(*self.args, **self.kwargs)

    # One row.

    def to_rows(self, z: SiteValues) -> SiteValues:
        """Unconstrained values with an axis of rows in front."""
        return {name: jnp.expand_dims(x, 0) for name, x in z.items()}

    def from_rows(self, rows: SiteValues) -> SiteValues:
        """Undo :meth:`to_rows`."""
        return {name: x[0] for name, x in rows.items()}

    def flatten(self, z: SiteValues) -> jax.Array:
        """All coordinates in one vector, (1, dimension), sites sorted by name."""
        rows = self.to_rows(z)
        return flatten_sites(rows, sorted(rows))[0]


class _EnergyFound(Exception):
    """The model states an energy."""


class _Complete(Messenger):
    """Give the elements of an `obs_mask` that nothing reads a law, where NumPyro has them flat."""

    def __init__(self, fn: Model, names: list[str]):
        self.names = names
        super().__init__(fn)

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "sample" and msg["name"] in self.names:
            msg["fn"] = Completed(msg["fn"])


class _StopAtEnergy(Messenger):
    """Run a model up to its first energy."""

    def process_message(self, msg: dict[str, Any]) -> None:
        if is_energy(msg):
            raise _EnergyFound
