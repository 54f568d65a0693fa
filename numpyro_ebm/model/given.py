# SPDX-License-Identifier: Apache-2.0
"""Hierarchies over the parameters of an energy: those above the sites that it reads."""

from collections.abc import Sequence
from typing import Any

from numpyro.handlers import seed, substitute, trace
from numpyro.primitives import Messenger

from numpyro_ebm._compat import eval_provenance
from numpyro_ebm.errors import ModelError
from numpyro_ebm.keys import default_key
from numpyro_ebm.language.handlers import resolve_normalizer
from numpyro_ebm.language.questions import NORMALIZER
from numpyro_ebm.language.sites import is_energy, plates_of, unwrap
from numpyro_ebm.model.priors import isolated
from numpyro_ebm.signatures import checked
from numpyro_ebm.types import Model

__all__ = ["given"]


class given(Messenger):
    r"""State that the energies of a model depend on its parameters through some sites only.

    .. math:: p(μ, β, v) = π(μ)\, π(β \mid μ)\, \frac{\tilde p(v; β)}{Z(β)}

    Where all these sites (β) are conditioned, as the blocks of ``numpyro.infer.Gibbs`` condition
    what other blocks own, Z is a constant, and the rest (μ) has an ordinary density: NUTS may draw
    it. Where one of them is not, the normalizer is as unresolved as without this handler. The
    statement is checked in every run that relies on it.

    :param model: a NumPyro model with energy statements.
    :param names: names of the sample sites through which parameters reach the energies.
    :return: a NumPyro model with the same arguments.
    :raises ModelError: when run with the named sites conditioned, if another unobserved parameter
        reaches an energy past them, or the model lacks a named site; at once, if ``names`` is not a
        sequence of names.

    **Example**

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import numpyro
    >>> import numpyro.distributions as dist
    >>> from numpyro.infer import NUTS, Gibbs
    >>> import numpyro_ebm as ebm
    >>> def model(data):
    ...     mu = numpyro.sample("mu", dist.Normal(0, 1))
    ...     precision = numpyro.sample("precision", dist.LogNormal(mu, 0.5))
    ...     with numpyro.plate("data", len(data)):
    ...         v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
    ...         ebm.energy("E", 0.5 * precision * v**2)
    >>> def normal_rows(rng_key, params):
    ...     return {"v": jax.random.normal(rng_key, (5,)) / jnp.sqrt(params["precision"])}
    >>> hierarchy = ebm.given(model, ["precision"])
    >>> exchange = ebm.Exchange(hierarchy, normal_rows)
    >>> kernel = Gibbs([(exchange, ["precision"]), (NUTS(hierarchy), ["mu"])])
    """

    @checked
    def __init__(self, fn: Model | None = None, names: Sequence[str] = ()):
        if isinstance(names, str) or not names or not all(isinstance(x, str) for x in names):
            raise ModelError(
                '`given(model, names)` takes a sequence of names of sample sites, such as ["beta"],'
                f" got {names!r}."
            )
        self.names = tuple(names)
        super().__init__(fn)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._observed, self._sites, self._relied_on = set(), {}, False
        result = super().__call__(*args, **kwargs)
        if self._relied_on:
            self._check(args, kwargs)
        return result

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == NORMALIZER and set(self.names) <= self._observed:
            msg["value"], msg["stop"], self._relied_on = "given", True, True

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] in ("sample", "param", "plate"):
            self._sites[msg["name"]] = dict(msg)
        if msg["type"] == "sample" and msg["is_observed"] and msg["name"] in self.names:
            self._observed.add(msg["name"])

    def _check(self, args, kwargs):
        """Raise if an unobserved parameter reaches an energy other than through the named sites."""
        sites = self._sites
        energies = [name for name, site in sites.items() if is_energy(site)]
        rows = frozenset.intersection(*(plates_of(sites[name]) for name in energies))
        values = {k: site["value"] for k, site in sites.items() if k not in energies}
        free = {
            name: values[name]
            for name, site in sites.items()
            if site["type"] == "param"
            or (site["type"] == "sample" and not site["is_observed"] and not plates_of(site) & rows)
        }

        def run(**labelled):
            prepared = substitute(seed(self.fn, default_key()), data={**values, **labelled})
            model_trace = trace(resolve_normalizer(prepared)).get_trace(*args, **kwargs)
            return {name: unwrap(model_trace[name]["fn"]).energy for name in energies}

        with isolated():  # the handlers around see the run itself only
            reached = eval_provenance(run, **free)
        for name, labels in reached.items():
            if labels:
                raise ModelError(
                    f"`given(model, {list(self.names)})`: the energy '{name}' depends on "
                    f"{', '.join(map(repr, sorted(labels)))} as well, and not through "
                    f"{list(self.names)} alone, so that its normalizer is not a constant there. "
                    f"Add to the names, and to the sites of `Exchange`, what reaches '{name}'."
                )
