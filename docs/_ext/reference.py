# SPDX-License-Identifier: Apache-2.0
"""The reference: a page for each public object, a page for each group, made when a build begins.

Signatures are shown as they are written in the source, so that an annotation is the name of a type
(`Model`, `ArrayLike`) and not all that it stands for.
"""

import abc
import ast
import functools
import inspect
import textwrap
from importlib import import_module
from pathlib import Path
from typing import Generic

import numpyro_ebm as ebm

__all__ = ["GROUPS", "objects", "setup"]

# A group: its title, a sentence, and its objects by their names in `numpyro_ebm`. The names of the
# registries come from their packages.
GROUPS = {
    "language": (
        "The language",
        "What a model is written with, and what holds or changes it.",
        "energy visible Lebesgue Counting fixed temper integrated given prior",
    ),
    "marginals": (
        "Marginals",
        "Ways to integrate latent sites out: [which when](../marginals.md).",
        ebm.marginals.__all__,
    ),
    "objectives": (
        "Objectives",
        "Losses that learn an energy: [which when](../objectives.md).",
        [*ebm.objectives.__all__, "objectives.mlp_critic"],
    ),
    "training": (
        "Training",
        "`EnergySVI`, losses for guides, files.",
        "EnergySVI svi.EnergySVIState svi.EnergySVIRunResult RelaxedELBO PosteriorScore Checkpoint "
        "save load svi.SavedState",
    ),
    "kernels": (
        "Sampling",
        "Kernels for `numpyro.infer.MCMC`, and draws in one call: [which when](../sampling.md).",
        [*ebm.mcmc.__all__, "mcmc.choose_kernel"],
    ),
    "normalizers": (
        "log Z",
        "Normalizers and likelihoods: [every way](../normalizers.md).",
        "log_normalizer log_likelihood log_normalizers.LogNormalizer log_normalizers.LogLikelihood",
    ),
    "posteriors": (
        "Posteriors of parameters",
        "From a prior and an energy to a posterior: [which route](../posteriors.md).",
        "normalized emulate_log_normalizer posteriors.EmulatedLogNormalizer generalized "
        "posteriors.calibration.Calibration posteriors.conjugate.GaussianPosterior Exchange "
        "posteriors.exchange.kernel.AuxiliaryTrace predictive simulation_based_calibration "
        "posteriors.SimulationBasedCalibration",
    ),
    "diagnostics": (
        "Diagnostics",
        "Tests of fit, gaps of guides, comparisons, ArviZ: [what to look at](../diagnostics.md).",
        "to_arviz compare stein_test diagnostics.SteinTest posterior_gap diagnostics.PosteriorGap "
        "diagnostics.BiasBound energy_gap diagnostics.EnergyGap fisher_divergence "
        "diagnostics.fisher.FisherDivergenceResult auxiliary_adequacy "
        "diagnostics.AuxiliaryAdequacy diagnostics.two_sample_test diagnostics.TwoSampleTest "
        "diagnostics.frechet_distance diagnostics.cosine_features diagnostics.FrechetDistance "
        "diagnostics.nearest_rows diagnostics.NearestRows diagnostics.classification "
        "diagnostics.Classification diagnostics.auroc diagnostics.Auroc "
        "diagnostics.denoising_loss diagnostics.DenoisingLoss "
        "diagnostics.log_likelihood_bounds diagnostics.LikelihoodBounds",
    ),
    "plots": ("Plots", "Pictures of energies, chains and runs.", "plots"),
    "models": ("Models", "Models that are ready.", "models"),
    "datasets": ("Data", "Data to try a model on.", "datasets"),
    "errors": (
        "Errors and warnings",
        "What is raised, and what is said.",
        [name for name in ebm.__all__ if name.endswith(("Error", "Warning"))],
    ),
    "extending": (
        "Write your own",
        "The classes that a new objective, marginal or way to log Z derives from.",
        "objectives.Objective objectives.AuxiliaryNetwork objectives.Problem "
        "objectives.persistent_chains.Chains marginals.Marginal marginals.ExactMarginal "
        "marginals.exact_marginal marginals.Estimate log_normalizers.methods.Method "
        "log_normalizers.integrand.Integrand",
    ),
    "states": (
        "States of kernels",
        "What `MCMC.last_state` holds, for those who resume or inspect a chain.",
        "mcmc.chain_kernel.LangevinState mcmc.adaptation.AdaptState "
        "mcmc.replica_exchange.ReplicaExchangeState mcmc.replica_exchange.LadderState "
        "mcmc.block_gibbs.BlockGibbsState mcmc.discrete_langevin.DiscreteLangevinState "
        "mcmc.swendsen_wang.SwendsenWangState posteriors.exchange.kernel.ExchangeState "
        "posteriors.exchange.warmup.ExchangeAdaptState",
    ),
    "samplers": (
        "Samplers",
        "The algorithms below the kernels: on log-densities, in BlackJAX's shape, without NumPyro.",
        "samplers.langevin samplers.block_gibbs samplers.discrete_langevin samplers.annealed "
        "samplers.tempering samplers.exchange samplers.per_row.per_row",
    ),
}

# Members that a page shows; a class that is not named shows none.
MEMBERS = {
    "EnergySVI": "init, update, stable_update, run, evaluate, get_params",
    "svi.EnergySVIState": "step_key",
    "generalized": "learning_rate, loss, calibrate, adjust, closed_form, is_random",
    "posteriors.EmulatedLogNormalizer": "mcse",
    "posteriors.SimulationBasedCalibration": "plot",
    "objectives.Objective": "loss, energy_loss, perturb, own_parameters, init_state, advance, "
    "statistics, review, check_sites",
    "marginals.Marginal": "check, bind",
    "marginals.ExactMarginal": "why_not, log_density, conditional, num_states, draw",
    "log_normalizers.integrand.Integrand": "log_density, log_densities, placeholder, values, "
    "sum_out, over_rows",
}
SAMPLER = ["init", "build_kernel", "as_top_level_api", "move", "swap", "equal_rejection_ladder"]
MODULES = {"plots", "models", "datasets"}  # groups of functions: each of them has a page


def find(name):
    """The object of a dotted name below `numpyro_ebm`."""
    *path, last = name.split(".")
    for depth in range(len(path), -1, -1):  # the longest part that is a module
        try:
            found = import_module(".".join(["numpyro_ebm", *path[:depth]]))
        except ModuleNotFoundError:
            continue
        for part in [*path[depth:], last]:
            found = getattr(found, part, None) or import_module(f"{found.__name__}.{part}")
        return found
    raise LookupError(name)


def members_of(group):
    names = GROUPS[group][2]
    names = names.split() if isinstance(names, str) else list(names)
    if group in MODULES:
        return [f"{group}.{name}" for name in find(group).__all__]
    return names


def objects():
    """Every documented name below `numpyro_ebm`, in the order of the pages."""
    return [name for group in GROUPS for name in members_of(group)]


def page_of_object(name):
    found = find(name)
    if inspect.ismodule(found):
        kind, options = "automodule", [":members: " + ", ".join(filter(vars(found).get, SAMPLER))]
    elif not isinstance(found, type):
        kind, options = ("autofunction", []) if callable(found) else ("autodata", [":no-value:"])
    else:
        kind = "autoexception" if issubclass(found, BaseException) else "autoclass"
        inherited = [":inherited-members:"] if name == "generalized" else []
        options = (
            [f":members: {MEMBERS[name]}", *inherited] if name in MEMBERS else [":no-members:"]
        )
    title = name.rpartition(".")[2] if kind != "automodule" else name
    directive = f".. {kind}:: numpyro_ebm.{name}"
    return "\n".join([title, "=" * len(title), "", directive, *(f"   {o}" for o in options), ""])


def page_of_group(group):
    title, sentence, _ = GROUPS[group]
    names = [f"numpyro_ebm.{name}" for name in members_of(group)]
    lines = ["```{eval-rst}", ".. autosummary::", "   :toctree: .", "   :nosignatures:", ""]
    return "\n".join(
        [f"# {title}", "", sentence, "", *lines, *(f"   {n}" for n in names), "```", ""]
    )


def write_pages(app):
    folder = Path(app.srcdir) / "api"
    folder.mkdir(exist_ok=True)
    pages = {f"{group}.md": page_of_group(group) for group in GROUPS}
    pages |= {f"numpyro_ebm.{name}.rst": page_of_object(name) for name in objects()}
    for stale in set(folder.iterdir()) - {folder / page for page in pages}:
        stale.unlink()
    for page, text in pages.items():
        if not (folder / page).exists() or (folder / page).read_text("utf-8") != text:
            (folder / page).write_text(text, "utf-8")


def written_signature(app, what, name, found, options, signature, returns):
    """The signature as the source has it; what has no source in Python keeps its own."""
    if what == "exception" and "__init__" not in vars(found):
        return ("", None) if signature else None  # where it has none, there is none to take away
    if isinstance(found, type):
        made = next((vars(k)["__init__"] for k in found.__mro__ if "__init__" in vars(k)), None)
        found = found if hasattr(found, "_fields") else made
    try:
        source = textwrap.dedent(inspect.getsource(inspect.unwrap(found)))
        node = ast.parse(source).body[0]
    except (OSError, TypeError, SyntaxError):
        return None
    if isinstance(node, ast.ClassDef):  # a NamedTuple: its fields, if none is inherited
        fields = [x for x in node.body if isinstance(x, ast.AnnAssign)]
        own = [x.target.id for x in fields] == list(found._fields)
        return (f"({', '.join(map(ast.unparse, fields))})", None) if own else None
    if not isinstance(node, ast.FunctionDef):
        return None
    arguments = node.args
    if arguments.args and arguments.args[0].arg in ("self", "cls"):
        del arguments.args[0]
    return f"({ast.unparse(arguments)})", node.returns and ast.unparse(node.returns)


@functools.cache
def with_pages():
    return {found for found in map(find, objects()) if isinstance(found, type)}


def public_bases(app, name, found, options, bases):
    """Bases that have a page, or are not ours; in the place of others, theirs."""

    def public(cls):
        if not cls.__module__.startswith("numpyro_ebm") or cls in with_pages():
            return [cls]
        return [base for inner in cls.__bases__ for base in public(inner)]

    hidden = (abc.ABC, object, Exception, Generic)
    bases[:] = dict.fromkeys(x for base in bases for x in public(base) if x not in hidden)
    if not bases:
        bases.append(object)


def setup(app):
    app.setup_extension("sphinx.ext.autodoc")
    app.connect("builder-inited", write_pages, priority=100)
    app.connect("autodoc-process-bases", public_bases)
    app.connect("autodoc-process-signature", written_signature)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
