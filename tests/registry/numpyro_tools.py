# SPDX-License-Identifier: Apache-2.0
"""Every tool of NumPyro that runs on a model, once: what is asked of it, and on which routes.

The verdict on a route is that of `tests/tools/test_tools.py`: the tool gives what it gives for the
same density in plain NumPyro (``SAME``), or raises what it says (a `Refused`), or has nothing to do
there (a `Nothing`, with the reason).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import numpyro.infer as infer
from numpyro import handlers
from numpyro.contrib import einstein
from numpyro.infer import autoguide as auto
from numpyro.infer import reparam
from numpyro.infer.util import (
    find_valid_initial_params,
    get_potential_fn,
    potential_energy,
)
from tools import laws


class Refused(NamedTuple):
    """The tool raises, with a message that matches."""

    match: str


class Nothing(NamedTuple):
    """The tool has nothing to do on this route, and why."""

    reason: str


SAME = "same"


class Tool(NamedTuple):
    """A tool.

    - **law** - model -> what it gives, a pytree of arrays.
    - **case** - on which models of `tests/tools/peers.py`.
    - **fixed, normalized, generalized** - verdicts.
    - **slow** - routes on which the test is one of `make slow`.
    - **guide** - for guides: model -> guide, also tried in `EnergySVI`, the fourth route.
    - **energy_svi** - the verdict there.
    """

    law: Callable[[Any], Any]
    case: str = "basic"
    fixed: Any = SAME
    normalized: Any = SAME
    generalized: Any = SAME
    slow: tuple[str, ...] = ()
    guide: Any = None
    energy_svi: Any = Nothing("runs on a model; `EnergySVI` is a trainer")


def of_guide(guide, *, case="basic", law=None, **verdicts):
    law = laws.updates(guide) if law is None else law
    return Tool(law, case=case, guide=guide, **{"energy_svi": SAME, "slow": DEAR, **verdicts})


def of_handler(handle, **verdicts):
    return Tool(laws.density(handle), **{"slow": ("generalized",), **verdicts})


def reparameterised(config, **verdicts):
    return of_handler(lambda model: handlers.reparam(model, config), **verdicts)


def loop(case):
    refused = dict.fromkeys(("fixed", "normalized", "generalized"), Refused("jax.lax.scan"))
    return Tool(laws.density(lambda m: m), case=case, **refused)


def resampled(rng_key, gibbs_sites, hmc_sites):
    """A Gibbs update of m from its prior, as a user may write one."""
    return {"m": 2.0 * dist.Normal(jnp.zeros_like(gibbs_sites["m"]), 1.0).sample(rng_key)}


def neutra(model):
    """A model in the coordinates of a guide that is not trained."""
    guide = auto.AutoIAFNormal(model, init_loc_fn=infer.init_to_mean)
    svi = infer.SVI(model, guide, numpyro.optim.SGD(1e-3), infer.Trace_ELBO())
    params = svi.get_params(svi.init(laws.KEY))
    return reparam.NeuTraReparam(guide, params).reparam(model)


def stein(vi, **options):
    def law(model):
        svi = vi(model, numpyro.optim.Adagrad(0.1), einstein.RBFKernel(), **options)
        num = (100,) if vi is einstein.ASVGD else ()
        state = svi.init(laws.KEY, *num)
        for _ in range(2):
            state, _ = svi.update(state)
        return svi.get_params(state)

    return law


def stein_vi(model, optim, kernel, **options):
    guide = auto.AutoNormal(model, init_loc_fn=infer.init_to_mean)
    return einstein.SteinVI(model, guide, optim, kernel, **options)


def surrogate(model):
    def flat():
        numpyro.sample("p", dist.Gamma(3.0, 2.0))
        with numpyro.plate("groups", 2):
            numpyro.sample("m", dist.Normal(0.0, 2.0))

    return auto.AutoSurrogateLikelihoodDAIS(model, flat, K=2)


def guides_in_parts(model):
    guide = auto.AutoGuideList(model)
    seeded = handlers.seed(model, laws.KEY)
    guide.append(auto.AutoNormal(handlers.block(seeded, hide=["m"])))
    guide.append(auto.AutoDelta(handlers.block(seeded, hide=["p"])))
    return guide


def taylor(model):
    at = {"p": jnp.array(1.0), "m": jnp.zeros(2)}
    return infer.HMCECS(infer.NUTS(model), num_blocks=2, proxy=infer.HMCECS.taylor_proxy(at))


LOST = Refused("energy|Lebesgue|draw")
DEAR = ("fixed", "normalized", "generalized")  # routes of dear tools, which `make slow` takes
LESS = ("normalized", "generalized")
IN_ROWS = Nothing("on parameters; sites of the rows have no groups")
OF_LOCAL = Nothing("for a model that states the likelihood given latent sites of the rows apart")

KERNELS = {
    "NUTS": Tool(laws.steps(infer.NUTS), slow=("fixed", "generalized")),
    "HMC": Tool(laws.steps(partial(infer.HMC, num_steps=3)), slow=DEAR),
    "BarkerMH": Tool(laws.steps(infer.BarkerMH), slow=DEAR),
    "SA": Tool(laws.steps(infer.SA), slow=DEAR),
    "AIES": Tool(laws.steps(infer.AIES, chains=8), slow=DEAR),
    "ESS": Tool(laws.steps(infer.ESS, chains=8), slow=DEAR),
    "HMCGibbs": Tool(
        laws.steps(lambda m: infer.HMCGibbs(infer.NUTS(m), resampled, ["m"])), slow=DEAR
    ),
    "CustomGibbs": Tool(
        laws.steps(
            lambda m: infer.Gibbs([(infer.NUTS(m), ["p"]), (infer.CustomGibbs(resampled), ["m"])])
        ),
        slow=DEAR,
    ),
    "Gibbs": Tool(
        laws.steps(lambda m: infer.Gibbs([(infer.NUTS(m), ["p"]), (infer.NUTS(m), ["m"])])),
        slow=DEAR,
    ),
    "DiscreteGibbs": Tool(
        laws.steps(
            lambda m: infer.Gibbs([(infer.NUTS(m), ["b"]), (infer.DiscreteGibbs(m), ["k"])])
        ),
        case="discrete",
        slow=DEAR,
    ),
    "DiscreteHMCGibbs": Tool(
        laws.steps(lambda m: infer.DiscreteHMCGibbs(infer.NUTS(m))), case="discrete", slow=DEAR
    ),
    "MixedHMC": Tool(
        laws.steps(lambda m: infer.MixedHMC(infer.HMC(m, num_steps=2))),
        case="discrete",
        slow=DEAR,
    ),
    "NUTS, enumerating": Tool(laws.steps(infer.NUTS), case="discrete", slow=DEAR),
    "HMCECS": Tool(
        laws.steps(lambda m: infer.HMCECS(infer.NUTS(m), num_blocks=2)),
        case="subsampled",
        fixed=Nothing("its latent sites are those of the rows that are left out"),
        slow=("generalized", "normalized"),
    ),
    "HMCECS, taylor_proxy": Tool(
        laws.steps(taylor),
        case="subsampled",
        fixed=Nothing("its latent sites are those of the rows that are left out"),
        generalized=Refused("taylor_proxy"),
        slow=LESS,
    ),
}

DRAW_ONLY = partial(auto.AutoNormal, init_loc_fn=infer.init_to_mean)
LOOKS = Refused("looks at the density")

ELBOS = {
    "Trace_ELBO": Tool(laws.updates(DRAW_ONLY, infer.Trace_ELBO), slow=LESS),
    "TraceMeanField_ELBO": Tool(laws.updates(DRAW_ONLY, infer.TraceMeanField_ELBO), slow=DEAR),
    "TraceGraph_ELBO": Tool(laws.updates(DRAW_ONLY, infer.TraceGraph_ELBO), slow=DEAR),
    "RenyiELBO": Tool(laws.updates(DRAW_ONLY, partial(infer.RenyiELBO, 0.5, 3)), slow=DEAR),
    "TraceEnum_ELBO": Tool(
        laws.updates(loss=partial(infer.TraceEnum_ELBO, max_plate_nesting=1)),
        case="discrete",
        slow=("normalized",),
    ),
    "TraceEnum_ELBO, plates guessed": Tool(
        laws.updates(loss=infer.TraceEnum_ELBO), case="discrete", slow=("fixed", "normalized")
    ),
}

GUIDES = {
    "AutoNormal": of_guide(DRAW_ONLY),
    "AutoDiagonalNormal": of_guide(auto.AutoDiagonalNormal, slow=DEAR),
    "AutoMultivariateNormal": of_guide(auto.AutoMultivariateNormal, slow=DEAR),
    "AutoLowRankMultivariateNormal": of_guide(auto.AutoLowRankMultivariateNormal, slow=DEAR),
    "AutoBatchedMultivariateNormal": of_guide(
        auto.AutoBatchedMultivariateNormal, case="batched", slow=DEAR
    ),
    "AutoBatchedLowRankMultivariateNormal": of_guide(
        auto.AutoBatchedLowRankMultivariateNormal, case="batched", slow=DEAR
    ),
    "AutoIAFNormal": of_guide(auto.AutoIAFNormal, slow=DEAR),
    "AutoBNAFNormal": of_guide(auto.AutoBNAFNormal, slow=DEAR),
    "AutoDelta": of_guide(auto.AutoDelta, slow=DEAR),
    "AutoLaplaceApproximation": of_guide(
        auto.AutoLaplaceApproximation, energy_svi=LOOKS, slow=DEAR
    ),
    "AutoDAIS": of_guide(partial(auto.AutoDAIS, K=2), energy_svi=LOOKS, slow=DEAR),
    "AutoSurrogateLikelihoodDAIS": of_guide(
        surrogate,
        energy_svi=LOOKS,
        fixed=IN_ROWS,
        slow=("normalized", "generalized"),
    ),
    "AutoSemiDAIS": of_guide(
        lambda m: auto.AutoSemiDAIS(m, m, auto.AutoDelta(m)),
        energy_svi=LOOKS,
        **dict.fromkeys(("fixed", "normalized", "generalized"), OF_LOCAL),
    ),
    "AutoGuideList": of_guide(guides_in_parts, slow=DEAR),
}

HANDLERS = {
    "block": of_handler(
        lambda m: handlers.block(handlers.seed(m, laws.KEY), hide=["p"]), slow=LESS
    ),
    "condition": of_handler(lambda m: laws.conditioned(m, "m", 0.3)),
    "do": of_handler(lambda m: laws.intervened(m, "m", 0.3)),
    "infer_config": of_handler(
        lambda m: handlers.infer_config(m, lambda site: {"a": 1}), slow=LESS
    ),
    "lift": of_handler(lambda m: handlers.lift(m, dist.Normal(0.0, 1.0))),
    "mask": of_handler(lambda m: handlers.mask(m, mask=jnp.array(False))),
    "reparam": reparameterised({"m": reparam.LocScaleReparam(0.5)}, slow=LESS),
    "replay": of_handler(
        lambda m: handlers.replay(m, handlers.trace(handlers.seed(m, laws.KEY)).get_trace())
    ),
    "scale": of_handler(lambda m: handlers.scale(m, scale=0.5), slow=LESS),
    "scope": of_handler(lambda m: handlers.scope(m, prefix="a")),
    "seed": of_handler(lambda m: handlers.seed(m, 3), slow=LESS),
    "substitute": of_handler(lambda m: laws.substituted(m, "m", 0.3), slow=LESS),
    "trace": Tool(laws.latent),
    "uncondition": of_handler(handlers.uncondition, fixed=LOST, normalized=LOST, generalized=LOST),
    "collapse": Tool(
        laws.density(handlers.collapse),
        fixed=Nothing("closed forms of funsor; `GaussianLatents` has those of energies"),
        normalized=Nothing("closed forms of funsor; `GaussianLatents` has those of energies"),
        generalized=Nothing("closed forms of funsor; `GaussianLatents` has those of energies"),
    ),
    "contrib.control_flow.scan": loop("scanned"),
    "contrib.control_flow.cond": loop("branched"),
}

REPARAMS = {
    "LocScaleReparam": reparameterised({"m": reparam.LocScaleReparam(0.0)}),
    "TransformReparam": reparameterised(
        {"t": reparam.TransformReparam()}, case="vectors", slow=LESS
    ),
    "CircularReparam": reparameterised({"a": reparam.CircularReparam()}, case="vectors", slow=LESS),
    "ProjectedNormalReparam": reparameterised(
        {"d": reparam.ProjectedNormalReparam()}, case="vectors", slow=LESS
    ),
    "ExplicitReparam": reparameterised(
        {"t": reparam.ExplicitReparam(dist.transforms.AffineTransform(1.0, 3.0))},
        case="vectors",
        slow=LESS,
    ),
    "HaarReparam": reparameterised({"u": reparam.HaarReparam(dim=-1)}, case="vectors", slow=LESS),
    "DiscreteCosineReparam": reparameterised(
        {"u": reparam.DiscreteCosineReparam(dim=-1)}, case="vectors", slow=LESS
    ),
    "UnitJacobianReparam": reparameterised(
        {
            "u": reparam.UnitJacobianReparam(
                dist.transforms.PermuteTransform(jnp.array([2, 0, 1, 3]))
            )
        },
        case="vectors",
        slow=LESS,
    ),
    "NeuTraReparam": of_handler(neutra, fixed=IN_ROWS, slow=DEAR),
}

UTILITIES = {
    "log_density": Tool(laws.density(lambda m: m)),
    "potential_energy": Tool(
        laws.of_latent(lambda m, x: potential_energy(m, (), {}, x)), slow=LESS
    ),
    "get_potential_fn": Tool(
        laws.of_latent(lambda m, x: get_potential_fn(m, {}, enum=False)[0](x)),
        slow=DEAR,
    ),
    "find_valid_initial_params": Tool(
        lambda m: find_valid_initial_params(laws.KEY, handlers.seed(m, laws.KEY)), slow=DEAR
    ),
    "initialize_model": Tool(laws.started(infer.init_to_uniform), slow=LESS),
    "log_likelihood": Tool(
        laws.likelihoods, generalized=Nothing("a loss has no likelihood of single rows")
    ),
    "Predictive, of draws": Tool(laws.predicted),
    "Predictive, of the prior": Tool(laws.drawn, fixed=Refused("draw"), slow=("generalized",)),
    "Predictive, infer_discrete": Tool(
        partial(laws.predicted, infer_discrete=True, only="b"),
        case="discrete",
        slow=("fixed", "generalized"),
    ),
    "psis_diagnostic": Tool(laws.psis, slow=DEAR),
    "init_to_uniform": Tool(laws.started(infer.init_to_uniform), slow=DEAR),
    "init_to_feasible": Tool(laws.started(infer.init_to_feasible), slow=DEAR),
    "init_to_mean": Tool(laws.started(infer.init_to_mean), slow=DEAR),
    "init_to_median": Tool(laws.started(infer.init_to_median), slow=DEAR),
    "init_to_sample": Tool(laws.started(infer.init_to_sample), slow=DEAR),
    "init_to_value": Tool(
        laws.started(partial(infer.init_to_value, values={"p": jnp.array(1.3)})),
        fixed=IN_ROWS,
        slow=DEAR,
    ),
    "contrib.funsor.log_density": Tool(laws.enumerated, case="discrete"),
    "contrib.funsor.infer_discrete": Tool(laws.inferred, case="discrete", slow=DEAR),
    "contrib.einstein.SVGD": Tool(stein(einstein.SVGD, num_stein_particles=3), slow=DEAR),
    "contrib.einstein.ASVGD": Tool(stein(einstein.ASVGD, num_stein_particles=3), slow=DEAR),
    "contrib.einstein.SteinVI": Tool(stein(stein_vi, num_stein_particles=3), slow=DEAR),
}

TOOLS = {**KERNELS, **ELBOS, **GUIDES, **HANDLERS, **REPARAMS, **UTILITIES}
