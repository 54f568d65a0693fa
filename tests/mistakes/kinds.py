# SPDX-License-Identifier: Apache-2.0
"""Mistakes of a kind: a class where an object is needed, a word where numbers are, and more."""

import functools
import tempfile
from pathlib import Path

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import optax
from mistakes.setting import (
    BITS,
    FIXED,
    FIXED_BITS,
    KEY,
    LINE,
    Mistake,
    X,
    bayesian,
    chain,
    fit,
    guide,
    model_of,
    noisy,
    plane,
    plate,
    rbm,
    svi,
)
from numpyro.infer import MCMC, NUTS, SVI
from numpyro.infer.autoguide import AutoNormal

import numpyro_ebm as ebm

PARAMS = {"W": jnp.eye(2)}
A_FUNCTION = "must be a function of NumPyro statements, and no class or distribution"
FOLDER = Path(tempfile.gettempdir())


def drawn_from(base):
    return model_of(lambda: base, lambda v, W: jnp.sum((v @ W) ** 2, -1))


def a_prior_from(base):
    def model(data=None):
        theta = numpyro.sample("theta", base)
        with plate(data):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            ebm.energy("E", 0.5 * theta * v**2)

    return model


def guide_from(base):
    def q(data=None):
        with plate(data):
            numpyro.sample("h", base)

    return q


CLASSES = {
    "of kernels, MCMC": Mistake(
        lambda: chain(ebm.MALA), r"`MALA` is a class.*`MCMC\(MALA\(model\), ...\)`"
    ),
    "of Exchange, MCMC": Mistake(lambda: chain(ebm.Exchange), "`Exchange` is a class"),
    "of base measures": Mistake(
        lambda: fit(drawn_from(ebm.Lebesgue)),
        r"'v' .*`Lebesgue` itself. Call it, `Lebesgue\(...\)`",
    ),
    "of base measures, sample": Mistake(
        lambda: ebm.sample(KEY, ebm.fixed(drawn_from(ebm.Counting), PARAMS), 1),
        "'v' .*`Counting` itself",
    ),
    "of distributions, a visible site": Mistake(
        lambda: ebm.log_likelihood(KEY, ebm.fixed(drawn_from(dist.Normal), PARAMS), X),
        "'v' .*`Normal` itself",
    ),
    "of distributions, made by a function": Mistake(
        lambda: fit(drawn_from(dist.Bernoulli), data=BITS), "'v' .*`Bernoulli` itself"
    ),
    "of distributions, a prior": Mistake(
        lambda: chain(NUTS(ebm.normalized(a_prior_from(dist.Gamma))), LINE), "'theta' .*`Gamma`"
    ),
    "of distributions, a prior of Exchange": Mistake(
        lambda: chain(ebm.Exchange(a_prior_from(dist.Gamma), ebm.MALA), LINE), "'theta' .*`Gamma`"
    ),
    "of distributions, a guide's": Mistake(
        lambda: fit(rbm, guide_from(dist.Bernoulli), loss=noisy()), "'h' .*`Bernoulli` itself"
    ),
    "a number for a distribution": Mistake(
        lambda: fit(rbm, guide_from(0.5), loss=noisy()), "'h' .*was given 0.5.*`obs=`"
    ),
    "data for a distribution": Mistake(
        lambda: fit(drawn_from(X)), r"'v' .*was given an array of shape \(6, 2\)"
    ),
    "of distributions for a guide": Mistake(lambda: svi(rbm, dist.Normal), A_FUNCTION),
    "a function that makes one for a guide": Mistake(lambda: svi(rbm, dist.Bernoulli), A_FUNCTION),
    "a distribution for a guide": Mistake(lambda: svi(rbm, dist.Bernoulli(0.5)), A_FUNCTION),
    "of AutoGuides": Mistake(lambda: svi(bayesian, AutoNormal), A_FUNCTION),
    "for a model": Mistake(lambda: svi(ebm.Lebesgue), A_FUNCTION),
    "for a model, a base measure that is made": Mistake(
        lambda: svi(ebm.Lebesgue((2,))), A_FUNCTION
    ),
    "for a kernel's model": Mistake(lambda: ebm.MALA(dist.Normal), A_FUNCTION),
    "of kernels for a model, sample": Mistake(lambda: ebm.sample(KEY, ebm.MALA, 1), A_FUNCTION),
    "of kernels for a model, log_normalizer": Mistake(
        lambda: ebm.log_normalizer(KEY, ebm.BlockGibbs), A_FUNCTION
    ),
    "a kernel for a model": Mistake(
        lambda: ebm.log_likelihood(KEY, ebm.MALA(FIXED), X), A_FUNCTION
    ),
    "a model that is called, prior": Mistake(
        lambda: ebm.prior(None),  # pyright: ignore
        "`model` must be a function, got None",
    ),
    "for a model, normalized": Mistake(lambda: ebm.normalized(ebm.MALA), A_FUNCTION),
    "for a model, generalized": Mistake(
        lambda: ebm.generalized(dist.Normal, ebm.ScoreMatching()), A_FUNCTION
    ),
    "for a model, Exchange": Mistake(lambda: ebm.Exchange(ebm.Lebesgue, ebm.MALA), A_FUNCTION),
    "of optimisers": Mistake(lambda: svi(optim=numpyro.optim.Adam), "`optim` must be an optimiser"),
    "of optimisers, a guide's": Mistake(
        lambda: svi(rbm, guide, guide_optim=numpyro.optim.Adam), "`guide_optim` must be an optim"
    ),
    "of checkpoints": Mistake(lambda: fit(checkpoint=ebm.Checkpoint), "must be the path"),
    "of refinements": Mistake(
        lambda: ebm.VaGES(2, refine=ebm.LangevinRefinement), r"`LangevinRefinement\(5\)`"
    ),
    "of kernels for a refinement": Mistake(
        lambda: ebm.VaGES(2, refine=ebm.BlockGibbs), r"`KernelRefinement\(BlockGibbs\)`"
    ),
    "of marginals, stein_test": Mistake(
        lambda: ebm.stein_test(KEY, FIXED, X, marginal=ebm.Exact), "must be a marginal such as"
    ),
    "of objectives, a sum": Mistake(
        lambda: ebm.ScoreMatching() + ebm.ScoreMatching, "do not add up"
    ),
    "of scores, compare": Mistake(
        lambda: ebm.compare({"a": FIXED, "b": FIXED}, X, score=ebm.ScoreMatching), "`score` must be"
    ),
    "of distributions, a network's base": Mistake(
        lambda: ebm.models.neural_energy(network(), 2, base=dist.Normal),
        "`base` must be a distribution of event shape",
    ),
    "a function for a network": Mistake(
        lambda: fit(ebm.models.neural_energy(ebm.models.mlp_network, 2)),
        "must be an equinox module.*got mlp_network",
    ),
    "a parameter's names for its values, loss": Mistake(
        lambda: ebm.ScoreMatching().loss(PARAMS, KEY, plane, None, X),
        r"`rng_key` must be a random key.*'rng_key', 'param_map'",
    ),
    "a class of objectives, NumPyro's SVI": Mistake(
        lambda: SVI(plane, None, optax.adam(0.1), ebm.PseudoLikelihood).run(
            KEY, 1, X, progress_bar=False
        ),
        "must be an objective such as",
    ),
}


def network(shape=2, **options):
    return ebm.models.mlp_network(KEY, shape, widths=(4,), **options)


def grown(net, shape=2):
    return fit(ebm.models.neural_energy(net, shape))


NETWORKS = {
    "a seed for a key": Mistake(
        lambda: ebm.models.mlp_network(0, 2), "`rng_key` must be a random key"
    ),
    "shape and key exchanged": Mistake(
        lambda: ebm.models.conv_network((8, 8), KEY), "(`shape`|`rng_key`) must be"
    ),
    "one width": Mistake(
        lambda: ebm.models.mlp_network(KEY, 2, widths=64), r"`widths` must be a tuple.*got 64"
    ),
    "a word for widths": Mistake(
        lambda: ebm.models.mlp_network(KEY, 2, widths="64"), "`widths` must be a tuple"
    ),
    "widths as floats": Mistake(
        lambda: ebm.models.mlp_network(KEY, 2, widths=(64.0,)), "in `widths`: .*integer, got 64.0"
    ),
    "a length as a float": Mistake(
        lambda: ebm.models.mlp_network(KEY, 2.0), "`shape` must be a tuple.*got 2.0"
    ),
    "an activation by name": Mistake(
        lambda: ebm.models.mlp_network(KEY, 2, activation="relu"), "`activation` must be a function"
    ),
    "an image by its length": Mistake(
        lambda: ebm.models.conv_network(KEY, 64), r"\(channels, height, width\)"
    ),
    "channels last": Mistake(
        lambda: ebm.models.conv_network(KEY, (8, 8, 1)), r"first: \(1, 8, 8\).*moveaxis"
    ),
    "a word for channels": Mistake(
        lambda: ebm.models.residual_network(KEY, (8, 8), channels="32"), "`channels` must be a tup"
    ),
    "a word for a shape": Mistake(
        lambda: ebm.models.neural_energy(network(), "2"), "`shape` must be a tuple"
    ),
    "a network of other rows": Mistake(
        lambda: grown(network(3)), r"network fails on its input, which has shape \(2,\)"
    ),
    "a network of more than a number": Mistake(
        lambda: grown(network(num_outputs=4)), r"'E' has shape \(6, 4\)"
    ),
    "parameters of another model, jem_logits": Mistake(
        lambda: ebm.models.jem_logits(network(num_outputs=3), PARAMS, X), "lack 'network.params'"
    ),
    "parameters of another model, grbm": Mistake(
        lambda: ebm.models.grbm_log_normalizer(PARAMS), r"dict of \['W', 'b', 'c', 'scale'\]"
    ),
    "a fit for parameters, grbm": Mistake(
        lambda: ebm.models.grbm_log_likelihood(fit, X), "`fit.params`, got function"
    ),
}


@functools.cache
def learned():
    """A learner, and what it learned in one step."""
    learner = svi()
    return learner, learner.run(KEY, 1, X, progress_bar=False)


def loaded(like):
    path = Path(tempfile.mkdtemp()) / "a.fit"
    ebm.save(path, learned()[1])
    return ebm.load(path, like)


FILES = {
    "a folder that is not there": Mistake(
        lambda: ebm.save(FOLDER / "not" / "there", learned()[1]), "there is no folder"
    ),
    "parameters for a fit": Mistake(lambda: ebm.save(FOLDER / "a", PARAMS), "got a dict"),
    "the path last": Mistake(
        lambda: ebm.save(PARAMS, FOLDER / "a"), "what `EnergySVI.run` returns"
    ),
    "a model to be like": Mistake(lambda: ebm.load(FOLDER / "a", plane), "`like` must be a `Map"),
    "parameters of another model": Mistake(
        lambda: loaded({"Q": jnp.eye(2)}),
        r"`like` has the parameters \['Q'\].*\['W'\]",
    ),
    "no interval": Mistake(lambda: ebm.Checkpoint(FOLDER, seconds=-1.0), "`seconds` must be pos"),
    "a flag that is a word": Mistake(
        lambda: svi().run(KEY, 1, X, progress_bar="no"), "`progress_bar` must be True or False"
    ),
    "a flag that is a word, sample": Mistake(
        lambda: ebm.sample(KEY, FIXED, 1, progress_bar="yes"), "`progress_bar` must be True or Fal"
    ),
    "a fit for a state, get_params": Mistake(
        lambda: learned()[0].get_params(learned()[1]), "`svi_state` must be"
    ),
    "a fit for a state, evaluate": Mistake(
        lambda: learned()[0].evaluate(learned()[1], X), "`svi_state` must be"
    ),
    "no parts": Mistake(lambda: ebm.WeightedSum([]), "`parts` is empty"),
}


D = ebm.diagnostics
STATISTICS = {
    "draws by site": Mistake(
        lambda: D.two_sample_test(KEY, {"v": X}, X), "`draws` must be an array of numbers"
    ),
    "draws that are NaN": Mistake(
        lambda: D.two_sample_test(KEY, X.at[0].set(jnp.nan), X), "`draws` has 2 values that are NaN"
    ),
    "draws that are infinite": Mistake(
        lambda: D.frechet_distance(KEY, X, X.at[0, 0].set(jnp.inf)), "`data` has 1 values"
    ),
    "rows of other lengths": Mistake(lambda: D.nearest_rows(X, LINE), "rows of 2, 1 entries"),
    "features by name": Mistake(
        lambda: D.frechet_distance(KEY, X, X, features="inception"), "`features` must be a function"
    ),
    "scores by site": Mistake(lambda: D.auroc({"v": LINE}, LINE), "`positive` must be an array"),
    "scores as text": Mistake(lambda: D.auroc(LINE, "high"), "`negative` must be an array"),
    "labels one-hot": Mistake(
        lambda: D.classification(KEY, X, jnp.eye(2)[BITS[:, 0]]), r"`labels` integers \(rows,\)"
    ),
    "labels from 1": Mistake(
        lambda: D.classification(KEY, X, BITS[:, 0] + 1), "label of row . is 2, and there are 2"
    ),
    "samples as text, energy_gap": Mistake(
        lambda: ebm.energy_gap(KEY, FIXED, X, "draws"), "`samples` must be an array of numbers"
    ),
    "one row, energy_gap": Mistake(
        lambda: ebm.energy_gap(KEY, FIXED, X[:1], X[:1]), "compares rows, and there is only one"
    ),
    "draws of other lengths, likelihood bounds": Mistake(
        lambda: D.log_likelihood_bounds(KEY, FIXED, X, X[:, :1]), r"\[\(2,\)\]; got .*\(6, 1\)"
    ),
    "draws by site, likelihood bounds": Mistake(
        lambda: D.log_likelihood_bounds(KEY, FIXED, X, {"v": X}), "`draws` are rows as those"
    ),
    "no noise, denoising_loss": Mistake(
        lambda: D.denoising_loss(KEY, FIXED, X, noise_scale=0.0), "`noise_scale` must be positive"
    ),
    "a dict of draws, auxiliary_adequacy": Mistake(
        lambda: ebm.auxiliary_adequacy({"v": X}), "`mcmc` must be a `MCMC`"
    ),
    "before its run, auxiliary_adequacy": Mistake(
        lambda: ebm.auxiliary_adequacy(
            MCMC(ebm.Exchange(bayesian, ebm.MALA), num_warmup=1, num_samples=1)
        ),
        "has not been run",
    ),
    "models in a list": Mistake(lambda: ebm.compare([FIXED], X), "must be a dict of models"),
    "fits without their models": Mistake(
        lambda: ebm.compare(dict.fromkeys("ab", learned()[1]), X), r"Give both, `\(model, fit\)`"
    ),
    "one end of an axis": Mistake(
        lambda: ebm.plots.density(FIXED, xlim=3), "`xlim` must be a tuple, got 3"
    ),
    "axes by name": Mistake(
        lambda: ebm.plots.samples(jnp.ones((2, 2, 2)), ax="left"), "`ax` must be .*got 'left'"
    ),
    "images that are rows": Mistake(lambda: ebm.plots.samples(LINE), "are no images"),
    "an array of energies": Mistake(lambda: ebm.plots.energies(X), "what `numpyro_ebm.energy_gap`"),
    "posterior draws in a list": Mistake(
        lambda: ebm.predictive(KEY, bayesian, [LINE]), "must be a dict of draws"
    ),
    "a kernel that is made, predictive": Mistake(
        lambda: ebm.predictive(KEY, bayesian, {"theta": LINE**2}, kernel=ebm.MALA(FIXED)),
        "`kernel` must be a function",
    ),
    "names by one word, integrated": Mistake(
        lambda: ebm.integrated(FIXED, "v"), "`names` must be a sequence, got 'v'"
    ),
    "names by one word, predictive": Mistake(
        lambda: ebm.predictive(KEY, bayesian, {"theta": LINE**2}, observed="v"),
        "sequence of names, got 'v'",
    ),
    "parameters of no guide": Mistake(
        lambda: ebm.generalized(bayesian, ebm.ScoreMatching(), guide_params={"A": X}),
        "Pass `guide=` too",
    ),
    "blocks by one word": Mistake(
        lambda: ebm.BlockGibbs(FIXED_BITS, blocks="v"), r'such as \[\["v"\], \["h"\]\], got'
    ),
}
