# SPDX-License-Identifier: Apache-2.0
"""Handlers that resolve the normalizer of an energy."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpyro
from jax.typing import ArrayLike
from numpyro.primitives import Messenger, plate

from numpyro_ebm._compat import handler_stack
from numpyro_ebm.errors import ModelError, check_not_negative
from numpyro_ebm.language.explained import explained
from numpyro_ebm.language.questions import INVERSE_TEMPERATURE, NORMALIZER
from numpyro_ebm.language.sites import is_energy, masks_of, plates_of, without_masks
from numpyro_ebm.signatures import checked
from numpyro_ebm.types import Params

__all__ = [
    "FIT_TEMPERATURE",
    "resolve_normalizer",
    "fixed",
    "refuse_energies_in_loops",
    "restricted",
    "integrated",
    "substitute_and_block",
    "uncondition",
    "set_visible",
    "temper",
]

FIT_TEMPERATURE = "fit_temperature"
"""Name among the parameters of a fit of the temperature that they were fitted at."""


class resolve_normalizer(Messenger):
    """Let the energies of a model be evaluated: the caller provides log Z, or does not need it.

    :param fn: a model.
    :param str who: name of the caller, recorded in the energy site as ``handled_by``.
    """

    def __init__(self, fn: Callable[..., Any] | None = None, who: str = "objective"):
        self.who = who
        super().__init__(fn)

    def process_message(self, msg: dict[str, Any]) -> None:
        refuse_energies_in_loops(msg)
        if msg["type"] == NORMALIZER:
            msg["value"] = self.who


def refuse_energies_in_loops(msg: dict[str, Any]) -> None:
    """Let the energies in the bodies of a NumPyro `scan` or `cond` say that they cannot be there.

    NumPyro runs these bodies hidden from all handlers, so that no one could answer for log Z.

    :param dict msg: a message to a handler, as `process_message` receives it.
    """
    if msg["type"] == "control_flow":
        msg["args"] = tuple(_refuse_energies(x) if callable(x) else x for x in msg["args"])


class _refuse_energies(Messenger):
    def process_message(self, msg):
        if msg["type"] == NORMALIZER:
            raise ModelError(
                "An energy in the body of `numpyro.contrib.control_flow.scan` or `cond` is out of "
                "reach: the normalizer is that of a whole row. State it outside, "
                "`numpyro_ebm.energy(name, value)`, with a value calculated by `jax.lax.scan`, "
                "`jax.lax.cond` or `jnp.where`, and the visible sites as arrays with an event "
                "dimension for the steps."
            )


class set_visible(Messenger):
    """Give the ``visible`` statements of a guide the values an objective uses.

    :param fn: a guide.
    :param dict data: values by site name.
    """

    def __init__(self, fn: Callable[..., Any] | None = None, data: Any = None):
        self.data = {} if data is None else data
        super().__init__(fn)

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "visible" and msg["name"] in self.data:
            msg["value"] = self.data[msg["name"]]


class uncondition(Messenger):
    """Drop the observations of some sites, so that they are sampled.

    NumPyro's ``uncondition`` for named sites; an energy is an observed site, and has to stay one.

    :param fn: a model.
    :param names: names of sites.
    :param bool start_there: whether chains start at what was observed.
    """

    def __init__(
        self,
        fn: Callable[..., Any] | None = None,
        names: Iterable[str] = (),
        *,
        start_there: bool = True,
    ):
        self.names, self.start_there = frozenset(names), start_there
        super().__init__(fn)

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "sample" and msg["name"] in self.names and msg["is_observed"]:
            msg["infer"] = {**msg["infer"], "was_observed": self.start_there}
            _unobserve(msg)


class restricted(Messenger):
    """Hold some of the observed sites at their values, and make others latent.

    Those that are held are conditions: nothing is learned about their law. A site with an
    `obs_mask` that is made latent is one site, whatever was observed of it.

    :param fn: a model.
    :param given: names of the sites that are held.
    :param latent: names of the sites that are no longer observed.
    """

    def __init__(
        self,
        fn: Callable[..., Any] | None = None,
        given: Iterable[str] = (),
        latent: Iterable[str] = (),
    ):
        self.given, self.latent = frozenset(given), frozenset(latent)
        self._values: dict[str, Any] = {}  # of sites with an `obs_mask`, by name
        super().__init__(fn)

    def process_message(self, msg: dict[str, Any]) -> None:
        name = msg.get("name", "")
        if msg["type"] == "sample" and msg["is_observed"] and name in self.given:
            msg["infer"] = {**msg["infer"], "given": True}
        elif msg["type"] == "sample" and msg["is_observed"] and name in self.latent:
            _unobserve(msg)
            masked = any(not isinstance(x, bool) for x in masks_of(msg["fn"]))
            if masked and name.endswith("_observed"):
                msg["fn"] = without_masks(msg["fn"])
                self._values[name.removesuffix("_observed")] = None
        elif msg["type"] == "sample" and name.removesuffix("_unobserved") in self._values:
            msg["value"], msg["stop"] = self._values[name.removesuffix("_unobserved")], True
        elif msg["type"] == "deterministic" and name in self._values:
            msg["value"] = self._values[name]

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        name = msg.get("name", "").removesuffix("_observed")
        if name in self._values and msg["type"] == "sample" and msg["name"] != name:
            self._values[name] = msg["value"]


class integrated(Messenger):
    r"""Let kernels move part of the sites, and integrate real ones out in closed form.

    .. math:: p(z) = \int p(z, x)\, dx

    A kernel on the model then moves the other sites, z, by their exact marginal, as discrete sites
    are summed out of it. :func:`~numpyro_ebm.sample` and ``ContrastiveDivergence`` draw x from its
    exact conditional beside it: chains on the latents of a latent-space prior alone, for example.
    A site that integrates to one given the rest, and that no energy reads, needs no integral:
    chains of ``ContrastiveDivergence`` may hide it, ``numpyro.handlers.block(model, hide=["x"])``.

    :param model: a model with fixed parameters, ``fixed(model, params)``.
    :param names: names of real sites that are jointly Gaussian given the rest.
    :return: a NumPyro model with the same arguments.
    :raises ModelError: if there is no such site; when a kernel runs on it, if the sites are not
        Gaussian given the rest.

    **Example**

    >>> import jax, numpyro
    >>> import numpyro.distributions as dist
    >>> import numpyro_ebm as ebm
    >>> def latent_prior(rows=1):
    ...     with numpyro.plate("data", rows):
    ...         z = numpyro.sample("z", dist.Normal(0.0, 1.0))
    ...         numpyro.sample("x", dist.Normal(3.0 * z, 0.1))
    ...         ebm.energy("E", z**4)
    >>> model = ebm.integrated(ebm.fixed(latent_prior, {}), ["x"])
    >>> state = ebm.MALA(model, step_size=0.1).init(jax.random.key(0), 0, None, (), {})
    >>> list(state.z)
    ['z']
    """

    @checked
    def __init__(self, fn: Callable[..., Any] | None = None, names: Iterable[str] = ()):
        self.names, self._seen = frozenset(names), set()
        super().__init__(fn)

    def __exit__(self, exc_type: Any, exc_value: Any, traceback: Any) -> None:
        super().__exit__(exc_type, exc_value, traceback)
        missing = sorted(self.names - self._seen)
        if exc_type is None and missing:
            raise ModelError(f"`integrated`: the model has no site(s) {missing}.")

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "sample" and msg["name"] in self.names:
            self._seen.add(msg["name"])
            msg["infer"] = {**msg["infer"], "integrated": True}


class substitute_and_block(Messenger):
    """Give sites constant values, and hide them from handlers outside.

    :param fn: a model or a guide.
    :param dict data: values of ``param`` and ``sample`` sites by name.
    """

    def __init__(self, fn: Callable[..., Any] | None = None, data: Any = None):
        self.data = {} if data is None else data
        super().__init__(fn)

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] in ("param", "sample") and msg["name"] in self.data:
            msg["value"] = self.data[msg["name"]]
            msg["stop"] = True


class fixed(explained):
    r"""Hold the parameters of an energy-based model fixed.

    With θ fixed, Z(θ) is a constant and :math:`\log \tilde p(v, h; θ)` is the log-density of v and
    h up to that constant: NumPyro's ``MCMC`` kernels, ``log_density``, ``SVI`` with an ELBO over h,
    and every other tool are right on v and h. The parameters vanish from the model's trace.

    :param model: a NumPyro model with energy statements.
    :param dict params: values of its parameters by site name: ``param`` sites and latent sites
        outside the data plate. Names that the model does not have are ignored, so that the
        parameters of a guide may be among them. Where a fit says the temperature T that its chains
        had (``"fit_temperature"``), the model is that of :class:`temper` at 1/T.
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
            _temper(msg, 1.0 / self.params[FIT_TEMPERATURE])
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


class temper(Messenger):
    r"""Multiply the energies of a model by an inverse temperature.

    .. math:: p_β(v, h; θ) \propto b(v)\, b(h)\, e^{-β E(v, h; θ)}

    At β = 1 it is the model, at β = 0 its base measure b, and above 1 the model sharpened around
    its modes. It is the path of replica exchange, of annealed importance sampling and of tempered
    sequential Monte Carlo. The normalizer changes with β: hold the parameters with
    :class:`~numpyro_ebm.fixed`, inside or outside. Tempered twice, the factors multiply.

    :param model: a NumPyro model with energy statements.
    :param inverse_temperature: β, a non-negative scalar.
    :return: a NumPyro model with the same arguments.
    :raises ModelError: if β is negative, not finite, or not a scalar.

    **Example**

    >>> import jax.numpy as jnp
    >>> import numpyro
    >>> import numpyro_ebm as ebm
    >>> def gaussian(data=None):
    ...     with numpyro.plate("data", 1):
    ...         v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
    ...         ebm.energy("E", 0.5 * v**2)
    >>> hot = ebm.temper(ebm.fixed(gaussian, {}), 0.25)
    >>> float(numpyro.infer.util.log_density(hot, (jnp.array([2.0]),), {}, {})[0])
    -0.5
    """

    @checked
    def __init__(self, fn: Callable[..., Any] | None = None, inverse_temperature: ArrayLike = 1.0):
        if jnp.ndim(inverse_temperature) > 0:
            raise ModelError(
                "`temper`: `inverse_temperature` must be a scalar, got an array of shape "
                f"{jnp.shape(inverse_temperature)}."
            )
        beta: Any = inverse_temperature
        check_not_negative("temper", inverse_temperature=beta)
        self.inverse_temperature = inverse_temperature
        super().__init__(fn)

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == INVERSE_TEMPERATURE:
            _temper(msg, self.inverse_temperature)


def _temper(msg, inverse_temperature):
    before = 1.0 if msg["value"] is None else msg["value"]
    msg["value"] = before * inverse_temperature


def _unobserve(msg):
    msg["is_observed"], msg["value"] = False, None
    if msg["kwargs"]["rng_key"] is None:
        msg["kwargs"]["rng_key"] = numpyro.prng_key()


def _in_any_plate(msg):
    # Plates around the whole call have not added their frames yet.
    return msg["cond_indep_stack"] or any(isinstance(h, plate) for h in handler_stack)
