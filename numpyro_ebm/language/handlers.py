# SPDX-License-Identifier: Apache-2.0
"""Handlers by which the other floors run a model: who answers for log Z, what is observed."""

from collections.abc import Callable, Iterable
from typing import Any

import numpyro
from numpyro.primitives import Messenger

from numpyro_ebm.errors import ModelError
from numpyro_ebm.language.questions import NORMALIZER
from numpyro_ebm.language.sites import masks_of, without_masks
from numpyro_ebm.signatures import checked

__all__ = [
    "resolve_normalizer",
    "refuse_energies_in_loops",
    "restricted",
    "integrated",
    "substitute_and_block",
    "uncondition",
    "set_visible",
]


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


def _unobserve(msg):
    msg["is_observed"], msg["value"] = False, None
    if msg["kwargs"]["rng_key"] is None:
        msg["kwargs"]["rng_key"] = numpyro.prng_key()
