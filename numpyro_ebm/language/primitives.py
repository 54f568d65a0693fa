# SPDX-License-Identifier: Apache-2.0
"""The two statements that numpyro-ebm adds to NumPyro's language: ``energy`` and ``visible``."""

from typing import Any, TypeVar

import jax.numpy as jnp
import numpyro
from jax.typing import ArrayLike
from numpyro.handlers import trace
from numpyro.primitives import Messenger

from numpyro_ebm._compat import apply_stack, handler_stack, is_enumerating
from numpyro_ebm.errors import ImproperSamplingError, ModelError
from numpyro_ebm.language.distributions import Unnormalized, speak_for
from numpyro_ebm.language.explained import WHAT_A_ROW_NEEDS
from numpyro_ebm.language.questions import INVERSE_TEMPERATURE, ask, who_resolves
from numpyro_ebm.language.sites import unwrap

T = TypeVar("T", bound=ArrayLike)

__all__ = ["always_observed", "energy", "visible"]


def energy(name: str, value: ArrayLike) -> None:
    r"""State that the model's density is multiplied by exp(-value).

    .. math:: p(v, h; \theta) = \frac{1}{Z(\theta)}\, b(v)\, b(h)\, e^{-E(v, h; \theta)}

    with b the base measures of the sites. Several energies add up. It is an effect that must be
    handled: the log-density of its site raises :class:`~numpyro_ebm.errors.UnhandledEnergyError`
    until an objective or :func:`~numpyro_ebm.fixed` resolves the normalizer Z(θ).

    :param str name: name of the site.
    :param value: the energy in nats, one value per element of the enclosing plates: its shape must
        be the plates' shape, so that a forgotten axis is not broadcast silently.
    :raises ModelError: if the shape is not the shape of the enclosing plates.
    :raises ImproperSamplingError: under ``Predictive``, if sites of the energy's plate would be
        drawn from their base measure, which ignores the energy.

    **Example**

    >>> import jax.numpy as jnp
    >>> import numpyro
    >>> import numpyro_ebm as ebm
    >>> def gaussian(data=None):
    ...     precision = numpyro.param("precision", 1.0)
    ...     with numpyro.plate("data", 1 if data is None else len(data)):
    ...         v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
    ...         ebm.energy("E", 0.5 * precision * v**2)
    >>> numpyro.infer.util.log_density(
    ...     ebm.fixed(gaussian, {"precision": 2.0}), (jnp.ones(3),), {}, {}
    ... )[0]
    Array(-3., dtype=float32)
    """
    if not isinstance(name, str) or isinstance(value, str):
        raise ModelError(
            '`energy(name, value)` takes its name first, a string, as in `energy("E", value)`.'
        )
    if not handler_stack:
        return
    try:
        value = jnp.asarray(value)
    except (TypeError, ValueError) as error:
        raise ModelError(
            f"The energy '{name}' is a `{type(value).__name__}`, and numbers are needed, one for "
            "each row. Does the function that computes it return them?"
        ) from error
    if jnp.iscomplexobj(value):
        raise ModelError(
            f"The energy '{name}' is complex, and it has to be real: exp(-E) is a density. Take "
            "`jnp.real` of it, or `jnp.abs` of its parts, if the data are complex by intent."
        )
    if not jnp.issubdtype(value.dtype, jnp.floating):
        _forbid_steps(name, value)
        value = value.astype(jnp.result_type(float))
    inverse_temperature = ask(INVERSE_TEMPERATURE)
    if inverse_temperature is not None:
        value = inverse_temperature * value
    parameters = _free_parameters()
    fn = Unnormalized(value, name, parameters, who_resolves())
    for site in _recorded_sites():
        speak_for(site.get("fn"))
    statement = _ShapeOfPlates(jnp.shape(value))
    with statement:
        numpyro.sample(name, fn, obs=fn.sample(None), infer={"is_auxiliary": True})
    if numpyro.get_mask() is False:
        _forbid_forward_draws(name, statement.plates)


def visible(name: str, value: T) -> T:
    """Read a visible value in a guide, as the objective sees it.

    In an ordinary run it is ``value``. While an objective trains, it is the value at which the
    objective evaluates the model: noised for denoising objectives, perturbed or sampled for others.
    A guide q(h | v) has to read v through this statement, otherwise it would be fitted to the
    posterior at the wrong point.

    :param str name: name of the visible site in the model.
    :param value: the value to use when no objective overrides it, usually the data argument.
    :return: the visible value, of the shape of ``value``.
    :raises ModelError: if the name does not come first.

    **Example**

    >>> import numpyro_ebm as ebm
    >>> ebm.visible("v", 1.5)
    1.5
    """
    if not isinstance(name, str):
        raise ModelError(
            "`visible(name, value)` takes its name first, a string, as in "
            '`numpyro_ebm.visible("v", data)`.'
        )
    if not handler_stack:
        return value
    message = {
        "type": "visible",
        "name": name,
        "fn": lambda value: value,
        "args": (value,),
        "kwargs": {},
        "value": None,
        "scale": None,
        "cond_indep_stack": [],
    }
    return apply_stack(message)["value"]


class always_observed(Messenger):
    """Refuse to let `uncondition` draw a statement that is a density and no data."""

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "sample" and not msg["is_observed"]:
            raise ModelError(
                f"`numpyro.handlers.uncondition` takes the density '{msg['name']}' for data and "
                "would draw it, and the visible sites from their base measure. To make visible "
                "sites latent leave the data out of the arguments of the model; to draw them: "
                "`numpyro_ebm.sample(rng_key, fixed(model, params), num_samples)`."
            )


class _ShapeOfPlates(always_observed):
    """Compare the shape of one energy with the plates around it, before they broadcast it."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.plates = shape, set()

    def postprocess_message(self, msg):
        # The innermost handler post-processes last, after all plates have added their frames.
        if msg["type"] != "sample":
            return
        super().postprocess_message(msg)
        self.plates = {frame.name for frame in msg["cond_indep_stack"]}
        if is_enumerating():
            return
        frames = msg["cond_indep_stack"]
        expected = [1] * max((-frame.dim for frame in frames), default=0)
        for frame in frames:
            expected[frame.dim] = frame.size
        if self.shape != tuple(expected):
            plates = ", ".join(f"'{f.name}' (dim {f.dim}, size {f.size})" for f in frames)
            raise ModelError(
                f"The energy '{msg['name']}' has shape {self.shape}, but its plates "
                f"({plates or 'none'}) ask for {tuple(expected)}: one energy for each element. "
                + (
                    "Sum over event dimensions only, as in `jnp.sum(..., -1)`; a scalar would be "
                    "counted once for every element of the plate."
                    if frames
                    else WHAT_A_ROW_NEEDS
                )
            )


def _recorded_sites():
    sites = {}
    for handler in handler_stack:
        if isinstance(handler, trace):
            sites.update(handler.trace)
    return list(sites.values())


def _free_parameters():
    """Names of the parameters recorded so far: `param` sites, and latent sites outside plates."""
    return tuple(
        site["name"]
        for site in _recorded_sites()
        if site["type"] == "param"
        or (site["type"] == "sample" and not site["is_observed"] and not site["cond_indep_stack"])
    )


def _forbid_steps(name, value):
    """Refuse whole numbers as the energy of real sites: it has no slope, and teaches nothing."""
    real = [
        site["name"]
        for site in _recorded_sites()
        if site["type"] == "sample"
        and site["cond_indep_stack"]
        and not unwrap(site["fn"]).support.is_discrete
    ]
    if real and jnp.ndim(value):
        raise ModelError(
            f"The energy '{name}' is of type {value.dtype}, in steps over the real site(s) {real}: "
            "its slope is 0 everywhere. If steps are meant, write numbers, as in "
            "`jnp.where(v > 0, 1.0, 0.0)`."
        )


def _forbid_forward_draws(name, plates):
    # `seed` gives a random key to sites that have no value: these were drawn forward.
    drawn = [
        site["name"]
        for site in _recorded_sites()
        if site["type"] == "sample"
        and not site["is_observed"]
        and any(frame.name in plates for frame in site["cond_indep_stack"])
        and site["kwargs"].get("rng_key") is not None
    ]
    if drawn:
        raise ImproperSamplingError(
            f"`Predictive` would draw {', '.join(map(repr, drawn))} from the base measure and "
            f"ignore the energy '{name}'. Draw them with `numpyro_ebm.predictive(rng_key, "
            "model, posterior_samples, ...)` at draws of the parameters, at given ones with "
            "`numpyro_ebm.sample(rng_key, fixed(model, params), num_samples)` or by MCMC; such "
            "draws may be given to `Predictive(model, posterior_samples)`."
        )
