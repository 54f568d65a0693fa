# SPDX-License-Identifier: Apache-2.0
"""The handler that holds the parameters of a model, at which log Z is a constant."""

from collections.abc import Callable
from functools import partial
from typing import Any

from numpyro.primitives import plate

from numpyro_ebm._compat import handler_stack
from numpyro_ebm.errors import ModelError
from numpyro_ebm.language.explained import explained
from numpyro_ebm.language.handlers import refuse_energies_in_loops
from numpyro_ebm.language.questions import INVERSE_TEMPERATURE, NORMALIZER
from numpyro_ebm.language.sites import is_energy, plates_of
from numpyro_ebm.language.temper import multiply_temperature
from numpyro_ebm.signatures import checked
from numpyro_ebm.types import Params

__all__ = ["FIT_TEMPERATURE", "fixed"]

FIT_TEMPERATURE = "fit_temperature"
"""Name among the parameters of a fit of the temperature that they were fitted at."""


class fixed(explained):
    r"""Hold the parameters of an energy-based model fixed.

    With θ fixed, Z(θ) is a constant and :math:`\log \tilde p(v, h; θ)` is the log-density of v and
    h up to that constant: NumPyro's ``MCMC`` kernels, ``log_density``, ``SVI`` with an ELBO over h,
    and every other tool are right on v and h. The parameters vanish from the model's trace.

    :param model: a NumPyro model with energy statements.
    :param dict params: values of its parameters by site name: ``param`` sites and latent sites
        outside the data plate. Names that the model does not have are ignored, so that the
        parameters of a guide may be among them. Where a fit says the temperature T that its chains
        had (``"fit_temperature"``), the model is that of :class:`~numpyro_ebm.temper` at 1/T.
    :param kwargs: keyword arguments of the model, such as its sizes, for all calls that do not give
        others; after a fit ``**svi.static_kwargs``.
    :return: a NumPyro model with the same arguments.
    :raises ModelError: when run, if the model has a parameter that ``params`` lacks, or one named
        ``"fit_temperature"``.

    **Example**

    >>> import jax.numpy as jnp
    >>> import numpyro
    >>> import numpyro_ebm as ebm
    >>> def gaussian(data=None):
    ...     precision = numpyro.param("precision", 1.0)
    ...     with numpyro.plate("data", 1):
    ...         v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
    ...         ebm.energy("E", 0.5 * precision * v**2)
    >>> model = ebm.fixed(gaussian, {"precision": 4.0, "not in the model": 0.0})
    >>> sorted(numpyro.handlers.trace(model).get_trace(jnp.zeros(1)))
    ['E', 'data', 'v']
    """

    @checked
    def __init__(
        self, fn: Callable[..., Any] | None = None, params: Params | None = None, **kwargs: Any
    ):
        if not isinstance(params, dict):
            raise ModelError(
                "`fixed(model, params)` takes a dict of parameter values by site name, got "
                f"{type(params).__name__}."
            )
        self.params = params
        super().__init__(partial(fn, **kwargs) if fn is not None and kwargs else fn)

    def __enter__(self):
        self._latent, self._energies = [], []
        return super().__enter__()

    def __exit__(self, exc_type, exc_value, traceback):
        super().__exit__(exc_type, exc_value, traceback)
        if exc_type is None:
            self._check_latent()

    def process_message(self, msg: dict[str, Any]) -> None:
        super().process_message(msg)
        refuse_energies_in_loops(msg)
        if msg["type"] == NORMALIZER:
            msg["value"] = "fixed"
            msg["stop"] = True
        elif msg["type"] == INVERSE_TEMPERATURE and FIT_TEMPERATURE in self.params:
            multiply_temperature(msg, 1.0 / self.params[FIT_TEMPERATURE])
        elif msg.get("name") == FIT_TEMPERATURE and FIT_TEMPERATURE in self.params:
            raise ModelError(
                f"`fixed`: the site '{FIT_TEMPERATURE}' of the model has the name by which a fit "
                "says at which temperature its chains were; rename it."
            )
        elif msg["type"] == "param":
            if msg["name"] not in self.params:
                self._missing([msg["name"]])
            # A constant: hidden from outer handlers, which might train or replace it.
            msg["value"] = self.params[msg["name"]]
            msg["stop"] = True
        elif msg["type"] == "sample" and not msg["is_observed"] and msg["name"] in self.params:
            msg["value"] = self.params[msg["name"]]
            msg["stop"] = True
        elif msg["type"] == "sample" and not msg["is_observed"] and not _in_any_plate(msg):
            self._missing([msg["name"]])

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        super().postprocess_message(msg)
        if msg["type"] != "sample" or msg["name"] in self.params:
            return
        if is_energy(msg):
            self._energies.append(plates_of(msg))
        elif not msg["is_observed"]:
            self._latent.append((msg["name"], plates_of(msg)))

    def _check_latent(self):
        """Latent sites that do not share a plate with every energy are parameters with priors."""
        if self._energies:
            rows = frozenset.intersection(*self._energies)
            self._missing([name for name, plates in self._latent if not plates & rows])

    def _missing(self, names):
        if names:
            raise ModelError(
                f"`fixed`: no value for the parameter(s) {', '.join(map(repr, names))}. Give them "
                f"in `params` (it has {sorted(self.params) or 'no names'}); a visible or latent "
                "site belongs inside the data plate."
            )


def _in_any_plate(msg):
    # Plates around the whole call have not added their frames yet.
    return msg["cond_indep_stack"] or any(isinstance(h, plate) for h in handler_stack)
