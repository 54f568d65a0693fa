# SPDX-License-Identifier: Apache-2.0
r"""Parameters with priors in EnergySVI: penalised estimates and variational posteriors.

An objective L(θ), a mean over N rows, and a prior π make the generalised posterior

.. math:: π_N(θ) \propto π(θ)\, e^{-N \mathcal L(θ)}

Its mode minimises :math:`\mathcal L(θ) - \log π(θ) / N`; among the distributions q(θ; φ) of a
guide, the closest to it minimises

.. math:: E_{q(θ; φ)}\Big[\mathcal L(θ) + \tfrac1N \big(\log q(θ; φ) - \log π(θ)\big)\Big]

whose gradient in φ is taken through one reparameterised draw in every round. The part of a guide
that draws h is left with that draw as a constant.
"""

from typing import Any, NamedTuple, Self

import jax
from jax.lax import stop_gradient
from numpyro.distributions import Delta
from numpyro.handlers import seed, substitute, trace
from numpyro.infer import init_to_median
from numpyro.infer.autoguide import (
    AutoDAIS,
    AutoGuideList,
    AutoLaplaceApproximation,
    AutoSemiDAIS,
)

from numpyro_ebm._compat import eval_provenance
from numpyro_ebm.errors import ModelError, UnhandledEnergyError
from numpyro_ebm.keys import default_key
from numpyro_ebm.language.handlers import substitute_and_block
from numpyro_ebm.language.sites import log_prob_of, param_sites
from numpyro_ebm.language.supports import check_drawn
from numpyro_ebm.model.priors import check_priors, prior_part
from numpyro_ebm.model.row_model import RowModel
from numpyro_ebm.types import Model, Params, SiteValues

__all__ = ["Draw", "GlobalGuide", "check_supports", "start_at_median"]

READ_THE_DENSITY = (AutoDAIS, AutoLaplaceApproximation, AutoSemiDAIS)
"""Guides whose draws depend on the density of the model that they are made of."""

PARAM, SITE = "param:", "site:"
"""Before the names of sites whose influence is traced."""


def check_supports(row_model: RowModel) -> None:
    """Raise unless every parameter with a prior can be moved by gradients.

    :raises ModelError: naming the site, where a prior is improper, discrete, a point mass or
        subsampled, or where its support depends on other parameters.
    """
    check_priors(row_model, "EnergySVI")
    for name, fn in row_model.priors.items():
        if isinstance(fn, Delta):
            raise ModelError(
                f"EnergySVI: the prior of '{name}' is a point mass. Write "
                f'`numpyro.deterministic("{name}", ...)`.'
            )
        if fn.support.is_discrete:
            raise ModelError(
                f"EnergySVI: the parameter '{name}' is discrete, and gradients do not move it. "
                "Make it an argument of the model and fit once for each of its values, or give it "
                "a continuous parameterisation (the weights of a mixture, say)."
            )

    for name, plate in row_model.traced.subsampled_priors.items():
        raise ModelError(
            f"EnergySVI: the parameter '{name}' is in the subsampled plate '{plate}', so that it "
            "would be another one in every round. Drop its `subsample_size`."
        )

    def supports(**labelled):
        priors = row_model.traced.priors_at({k.removeprefix(PARAM): labelled[k] for k in labelled})
        return {name: jax.tree.leaves(fn.support) for name, fn in priors.items()}

    labelled = {PARAM + name: value for name, value in row_model.parameters.items()}
    for name, labels in eval_provenance(supports, **labelled).items():
        others = sorted(label.removeprefix(PARAM) for label in frozenset().union(*labels))
        if others:
            raise ModelError(
                f"EnergySVI: the support of '{name}' depends on {others}, so that its coordinates "
                "would change while it is learned. Sample it on a fixed support and transform it: "
                "`u = numpyro.sample(..., dist.Uniform(0, 1))`, then "
                f'`numpyro.deterministic("{name}", a + (b - a) * u)`.'
            )


def start_at_median(
    row_model: RowModel, rng_key: jax.Array, init_params: Params
) -> dict[str, tuple[Any, Any]]:
    """Where penalised estimation starts: medians of the priors, by NumPyro's ``init_to_median``.

    :param RowModel row_model: the model, read at ``init_params``.
    :param rng_key: random key for the draws that the medians are of.
    :param dict init_params: values to take instead, by name.
    :return: ``{name: (value, support)}`` of the parameters with priors.
    """
    given = {
        k: x
        for k, x in row_model.parameters.items()
        if k not in row_model.priors or k in init_params
    }
    sites = _run_prior(row_model, given, rng_key)
    return {name: (sites[name]["value"], sites[name]["fn"].support) for name in row_model.priors}


def _run_prior(row_model, values, rng_key=None):
    def median(site):
        if site["type"] == "sample" and site["value"] is None and not site["is_observed"]:
            return init_to_median(site)

    rng_key = default_key() if rng_key is None else rng_key
    prior = seed(prior_part(row_model.model, row_model.plate), rng_key)
    prior = substitute(substitute(prior, data={**row_model.plates, **values}), substitute_fn=median)
    return trace(prior).get_trace(*row_model.args, **row_model.kwargs)


class Draw(NamedTuple):
    """A draw of the parameters from a guide.

    - **params** - the parameters with priors, by name.
    - **log_density** - log q(θ; φ).
    - **sites** - values of all sites of the guide outside the data plate, auxiliary ones included.
    """

    params: SiteValues
    log_density: jax.Array
    sites: SiteValues


class GlobalGuide(NamedTuple):
    """The part q(θ; φ) of a guide that draws the parameters of a model. Made by :meth:`find`.

    - **guide** - the whole guide.
    - **priors** - names of the parameters with priors.
    - **sites** - names of the guide's sites outside the data plate.
    - **parameters** - names of φ.
    - **draws_rows** - whether the guide has a part q(h | v, θ) as well.
    """

    guide: Model
    priors: tuple[str, ...]
    sites: tuple[str, ...]
    parameters: tuple[str, ...]
    draws_rows: bool

    @classmethod
    def find(cls, guide: Model, row_model: RowModel, init_params: Params) -> Self | None:
        """Split a guide into q(θ; φ) and q(h | v, θ).

        :param guide: a guide.
        :param RowModel row_model: the model it belongs to, some of whose parameters have priors.
        :param dict init_params: values of `param` sites, by name.
        :return: a :class:`GlobalGuide`; ``None`` if the guide draws none of the parameters.
        :raises ModelError: if it draws some of the parameters and not others, or inside the data
            plate, or not differentiably, or if the parts share a `param` site.
        """
        if guide is None:
            return None
        _check_kind(guide)
        try:
            # An AutoGuide remembers the values of its first run, which must not be tracers. As that
            # run is slow, one operation at a time, h is not drawn in it.
            latent = {name: site.value for name, site in row_model.latent.items()}
            with jax.ensure_compile_time_eval():
                first = _trace(guide, row_model, {**latent, **init_params})
        except UnhandledEnergyError as error:
            raise ModelError(
                "EnergySVI: the guide evaluates the density of the model. Make an AutoGuide of its "
                "prior alone, `AutoNormal(numpyro_ebm.prior(model))`: the objective stands for "
                "the rows."
            ) from error
        samples = {name: site for name, site in first.items() if site["type"] == "sample"}
        inside = {
            name for name in samples if row_model.owns(samples[name]) or name in row_model.latent
        }
        outside = {name: site for name, site in samples.items() if name not in inside}
        _check_names(row_model, inside, outside)
        for name in row_model.priors.keys() & outside.keys():
            check_drawn(outside[name], row_model.priors[name], row_model.parameters[name])
        if not row_model.priors.keys() & outside.keys():
            return None
        found = {name: site["value"] for name, site in first.items() if site["type"] == "param"}
        own = {name: value for name, value in found.items() if name not in row_model.constraints}
        of_theta, of_rows = _dependence(guide, row_model, own, inside, outside)
        both = sorted(of_theta & of_rows)
        if both:
            raise ModelError(
                f"EnergySVI: both q(θ) and q(h | v) depend on the `param` site(s) {both} of the "
                "guide, which are trained on different losses. Give each part its own."
            )
        draws_rows = bool(inside)
        params = tuple(name for name in own if name in of_theta or not draws_rows)
        return cls(guide, tuple(row_model.priors), tuple(outside), params, draws_rows)

    def start(
        self, rng_key: jax.Array, row_model: RowModel, init_params: Params
    ) -> dict[str, tuple[Any, Any]]:
        """Initial values and constraints of φ, by name."""
        found = param_sites(_trace(self.guide, row_model, init_params, rng_key))
        return {name: found[name] for name in self.parameters}

    def draw(
        self, rng_key: jax.Array, params: Params, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Draw:
        """Draw θ ~ q(θ; φ), differentiable in φ.

        :param dict params: values of the guide's `param` sites, and perhaps others, by name.
        :param tuple args: arguments of the guide.
        :param dict kwargs: keyword arguments of the guide.
        :return: a :class:`Draw`.
        """
        params = {name: value for name, value in params.items() if name not in self.sites}
        guide = seed(substitute(self.guide, data=params), rng_key)
        guide_trace = trace(guide).get_trace(*args, **kwargs)
        sites = {name: guide_trace[name] for name in self.sites}
        values = {name: site["value"] for name, site in sites.items()}
        total: Any = sum(map(log_prob_of, sites.values()))
        return Draw({name: values[name] for name in self.priors}, total, values)

    def given(self, draw: Draw, params: Params) -> Model | None:
        """The guide q(h | v, θ) at a draw of θ, which it sees as a constant.

        :param Draw draw: the draw.
        :param dict params: values of φ, and perhaps others, by name.
        :return: a guide; ``None`` if nothing is left.
        """
        if not self.draws_rows:
            return None
        constants = {**draw.sites, **{name: params[name] for name in self.parameters}}
        return substitute_and_block(self.guide, stop_gradient(constants))


def _check_kind(guide):
    for part in guide if isinstance(guide, AutoGuideList) else (guide,):
        if part is not guide:
            _check_kind(part)
        elif isinstance(part, READ_THE_DENSITY):
            raise ModelError(
                f"EnergySVI: {type(part).__name__} looks at the density of its own model, and "
                "would see the prior alone: the rows are the objective's. Use "
                "AutoMultivariateNormal or another guide that only draws, AutoDelta for the mode, "
                f"or `numpyro.infer.SVI` with {type(part).__name__}(generalized(model, objective))."
            )


def _check_names(row_model, inside, outside):
    wrong = sorted(row_model.priors.keys() & inside)
    if wrong:
        raise ModelError(
            f"EnergySVI: the guide draws the parameter(s) {wrong} inside the data plate "
            f"'{row_model.plate}', once for every row. Draw them outside of it."
        )
    drawn = row_model.priors.keys() & outside.keys()
    unknown = sorted(
        name
        for name, site in outside.items()
        if name not in drawn and not site["is_observed"] and not site["infer"].get("is_auxiliary")
    )
    if unknown:
        raise ModelError(
            f"EnergySVI: the guide draws {unknown} outside the data plate '{row_model.plate}', and "
            "the model has no such parameter (those with priors are "
            f"{sorted(row_model.priors)}). Mark "
            'what is no parameter by `infer={"is_auxiliary": True}`.'
        )
    missing = sorted(row_model.priors.keys() - drawn)
    if drawn and missing:
        raise ModelError(
            f"EnergySVI: the guide draws {sorted(drawn)} and not {missing}, which have priors as "
            "well. Draw all parameters or none (for penalised estimates); a point estimate of some "
            "of them is a site `numpyro.sample(name, dist.Delta(numpyro.param(...)))` of the guide."
        )
    for name in outside if drawn else ():
        if not outside[name]["is_observed"] and not outside[name]["fn"].has_rsample:
            raise ModelError(
                f"EnergySVI: the guide's draws of '{name}' are not differentiable in their "
                "parameters. Use a reparameterised distribution, as NumPyro's AutoGuides do."
            )


def _dependence(guide, row_model, params, inside, outside):
    """Names of the guide's parameters that q(θ) depends on, and of those that q(h | v, θ) does."""

    def relevant(**labelled):
        own = {name: labelled[PARAM + name] for name in params}
        rows = {name: labelled[SITE + name] for name in inside}
        theta = _trace(guide, row_model, {**own, **rows})
        held = {name: stop_gradient(first[name]["value"]) for name in outside}
        local = _trace(substitute_and_block(guide, held), row_model, own)
        described = lambda site: (site["value"], log_prob_of(site))  # noqa: E731
        return (
            {name: described(theta[name]) for name in outside},
            {name: described(local[name]) for name in inside},
        )

    first = _trace(guide, row_model, params)
    rows = {SITE + name: first[name]["value"] for name in inside}
    labelled = {PARAM + name: value for name, value in params.items()}
    is_set = lambda x: isinstance(x, frozenset)  # noqa: E731
    of_theta, of_rows = (
        frozenset().union(*jax.tree.leaves(labels, is_leaf=is_set))
        for labels in eval_provenance(relevant, **labelled, **rows)
    )
    of_latent = sorted(name for name in inside if SITE + name in of_theta)
    if of_latent:
        raise ModelError(
            f"EnergySVI: the guide's draw of θ depends on its draw of {of_latent}, inside the data "
            f"plate '{row_model.plate}'. Draw θ first, and let q(h | v, θ) depend on it."
        )
    names = lambda labels: {x.removeprefix(PARAM) for x in labels if x.startswith(PARAM)}  # noqa: E731
    return names(of_theta), names(of_rows)


def _trace(guide, row_model, data, rng_key=None):
    rng_key = default_key() if rng_key is None else rng_key
    guide = seed(substitute(guide, data={**row_model.plates, **data}), rng_key)
    return trace(guide).get_trace(*row_model.args, **row_model.kwargs)
