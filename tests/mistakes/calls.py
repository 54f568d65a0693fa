# SPDX-License-Identifier: Apache-2.0
"""Mistakes with the options of calls that train and sample."""

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
import optax
from mistakes.setting import (
    ARGUMENTS,
    BITS,
    FIXED,
    FIXED_BITS,
    KEY,
    LINE,
    PARAMS,
    Mistake,
    X,
    chain,
    fit,
    guide,
    ising,
    line,
    model_of,
    plane,
    rbm,
    run,
    started,
    svi,
)
from numpyro.infer import NUTS, SVI, Trace_ELBO, init_to_value

import numpyro_ebm as ebm

SM = ebm.ScoreMatching
QUARTIC = ebm.fixed(model_of(ebm.Lebesgue, lambda v, W: v**4), {"W": jnp.eye(2)})

TRAINING = {
    "an ELBO for an objective": Mistake(
        lambda: svi(loss=Trace_ELBO()), "`loss` must be an objective.*`guide_loss`"
    ),
    "a class of objectives": Mistake(lambda: svi(loss=SM), "`loss` must be an objective"),
    "an objective by name": Mistake(
        lambda: svi(loss="score matching"), "`loss` must be an objective"
    ),
    "an objective for a guide's loss": Mistake(
        lambda: svi(rbm, guide, guide_loss=SM()), "guide_loss"
    ),
    "a misspelt option of an objective": Mistake(
        lambda: ebm.DenoisingScoreMatching(noise_scal=0.1),
        "Did you mean `noise_scale`",
        TypeError,
    ),
    "a misspelt option of EnergySVI": Mistake(
        lambda: fit(num_guide_step=2), "Did you mean `num_guide_steps`"
    ),
    "a misspelt option of run": Mistake(
        lambda: run(KEY, 1, X, batchsize=2), "Did you mean `batch_size`"
    ),
    "an option that nobody has": Mistake(
        lambda: run(KEY, 1, X, colour=2), r"no[tr]?.*'colour'.*passed on to the model"
    ),
    "a number for an optimiser": Mistake(lambda: svi(optim=0.01), "`optim` must be an optimiser"),
    "an optimiser that is not made": Mistake(
        lambda: svi(optim=optax.adam), "`optim` must be an optimiser"
    ),
    "an optimiser of a guide by name": Mistake(
        lambda: svi(rbm, guide, guide_optim="adam"), "`guide_optim` must be an optimiser"
    ),
    "no guide steps": Mistake(
        lambda: svi(num_guide_steps=0), "`num_guide_steps` must be a positive"
    ),
    "more rows in a batch than there are": Mistake(lambda: fit(batch_size=7), "at most the 6 rows"),
    "no rows in a batch": Mistake(lambda: fit(batch_size=0), "`batch_size` must be a positive"),
    "half rows in a batch": Mistake(lambda: fit(batch_size=2.0), "`batch_size` must be a positive"),
    "no steps": Mistake(lambda: run(KEY, 0, X), "`num_steps` must be a positive integer, got 0"),
    "steps as a float": Mistake(lambda: run(KEY, 1e3, X), "`num_steps` must be a positive integer"),
    "a seed for a key": Mistake(lambda: run(0, 1, X), r"`rng_key` must be a random key.*got 0"),
    "no key": Mistake(lambda: run(None, 1, X), "`rng_key` must be a random key"),
    "key and steps exchanged": Mistake(
        lambda: run(1, KEY, X), "`num_steps` must be a positive integer"
    ),
    "a seed for a key, init": Mistake(lambda: svi().init(0, X), "`rng_key` must be a random key"),
    "several keys": Mistake(
        lambda: run(jax.random.split(KEY, 3), 1, X), "`rng_key` must be a random key"
    ),
    "data for a key": Mistake(lambda: svi().init(X), "`rng_key` must be a random key"),
    "derivatives of bits": Mistake(lambda: fit(ising, data=BITS), "'v' is discrete. Use Pseudo"),
    "neighbours of real numbers": Mistake(
        lambda: fit(loss=ebm.PseudoLikelihood()), "'v' is continuous. Use ScoreMatching"
    ),
    "bits of three values": Mistake(
        lambda: svi(ising, loss=ebm.RatioMatching(), num_values=3).run(KEY, 1, BITS),
        "RatioMatching is for binary sites",
    ),
    "noise of another shape": Mistake(
        lambda: fit(loss=ebm.NCE(dist.Normal(0, 1))), r"event shape \(\), and the site \(2,\)"
    ),
    "noise by name": Mistake(lambda: ebm.NCE("normal"), "`noise` must be a NumPyro distribution"),
    "noise that is discrete": Mistake(
        lambda: fit(loss=ebm.NCE(dist.Bernoulli(0.5).expand([2]).to_event(1))), "noise.*'v'"
    ),
    "a kernel that is made": Mistake(
        lambda: ebm.ContrastiveDivergence(ebm.MALA(FIXED)), "function from a model to a kernel"
    ),
    **{
        f"an option of bits, real numbers: {cls.__name__}, {name}": Mistake(
            lambda cls=cls, name=name, value=value: fit(loss=cls(**{name: value})),
            f"{cls.__name__}: `{name}` is for discrete visible sites.*`noise_scale`",
        )
        for cls in (ebm.ConditionalNCE, ebm.KernelRatioMatching, ebm.EnergyDiscrepancy)
        for name, value in (("flip_probability", 0.3), ("perturbation", "cyclical"))
    },
    **{
        f"an option of real numbers, bits: {cls.__name__}": Mistake(
            lambda cls=cls: fit(ising, data=BITS, loss=cls(noise_scale=0.3)),
            f"{cls.__name__}: `noise_scale` is for continuous visible sites.*`flip_probability`",
        )
        for cls in (ebm.ConditionalNCE, ebm.KernelRatioMatching, ebm.EnergyDiscrepancy)
    },
    "a guide's loss without a guide": Mistake(
        lambda: svi(guide_loss=Trace_ELBO()).run(KEY, 1, X, progress_bar=False),
        r"`guide_loss` is for a guide q\(h",
    ),
    "a guide's optimiser without a guide": Mistake(
        lambda: svi(guide_optim=optax.adam(0.1)).init(KEY, X), r"`guide_optim` is for a guide q\(h"
    ),
    "a guide's steps without a guide": Mistake(
        lambda: svi(num_guide_steps=2).init(KEY, X), r"`num_guide_steps` is for a guide q\(h"
    ),
    "a negative scale of noise": Mistake(
        lambda: ebm.DenoisingScoreMatching(-0.1), "`noise_scale` must be positive"
    ),
    "initial parameters of another name": Mistake(
        lambda: fit(init_params={"w": jnp.eye(2)}), r"names \['w'\]; the parameters are \['W'\]"
    ),
    "initial parameters of another shape": Mistake(
        lambda: fit(init_params={"W": jnp.ones(5)}), r"'W' was given a value of shape \(5,\)"
    ),
    "initial parameters of another shape than a number": Mistake(
        lambda: fit(line, data=LINE, init_params={"m": jnp.ones(3)}),
        r"'m' was given a value of shape \(3,\), and the model declares it with the shape \(\)",
    ),
    "initial parameters as text": Mistake(
        lambda: fit(init_params={"W": "eye"}), "`init_params`: `W` must be an array of numbers"
    ),
    "initial parameters that are no dict": Mistake(
        lambda: fit(init_params=jnp.eye(2)), "`init_params` must be a `dict`"
    ),
    "parameters for a state": Mistake(lambda: fit(init_state=PARAMS), "is the state of a run"),
    "a callback that is never called": Mistake(
        lambda: fit(callback=print), "both of `callback` and `every`"
    ),
    "a callback that returns a number": Mistake(
        lambda: fit(num_steps=2, callback=lambda step, state, losses: losses.mean(), every=1),
        "`callback` returns True to end the run.*returned a `float",
    ),
    "a callback of a step": Mistake(
        lambda: fit(callback=lambda step: None, every=1), r"called with \(step, state, losses\)"
    ),
    "an objective for parameters": Mistake(
        lambda: fit(init_params=ebm.ScoreMatching()), "`init_params` must be a `dict`"
    ),
    "steps and data exchanged": Mistake(
        lambda: run(KEY, X, 2), "`num_steps` must be a positive integer"
    ),
    "data twice": Mistake(lambda: run(KEY, 1, X, data=X), "multiple values for argument 'data'"),
    "a marginal for EnergySVI": Mistake(
        lambda: fit(rbm, guide, marginal=ebm.VaGES(2)), r"called with.*\['marginal'\]"
    ),
    "scales of noise": Mistake(
        lambda: ebm.DenoisingScoreMatching(jnp.array([0.1, 0.2])), "`noise_scale` must be a number"
    ),
    "scales of noise by site": Mistake(
        lambda: ebm.DenoisingScoreMatching({"v": 0.1}), "`noise_scale` must be a number"
    ),
    "noise of all rows": Mistake(
        lambda: fit(loss=ebm.NCE(dist.Normal(0, 1).expand([6, 2]).to_event(2))),
        r"event shape \(6, 2\), and the site \(2,\)",
    ),
    "no noise": Mistake(
        lambda: ebm.NCE(dist.Normal(0, 1), noise_ratio=0), "`noise_ratio` must be a positive"
    ),
    "half a step of a chain": Mistake(
        lambda: ebm.ContrastiveDivergence(ebm.MALA, 5.5), "`num_steps` must be a positive integer"
    ),
    "a class of objectives, NumPyro's SVI": Mistake(
        lambda: SVI(plane, None, optax.adam(0.1), SM).run(KEY, 1, X, progress_bar=False),
        "must be an objective such as",
    ),
    "an average that does not decay": Mistake(
        lambda: fit(ema=1.0), "`ema` must be between 0 and 1"
    ),
    "an update without init": Mistake(
        lambda: svi().update(svi().init(KEY, X), X),
        "has no state yet.*`init`",
    ),
}

SAMPLING = {
    "fixed without a parameter": Mistake(
        lambda: ebm.sample(KEY, ebm.fixed(plane, {"w": jnp.eye(2)}), 1),
        "no value for the parameter",
    ),
    "fixed in another shape": Mistake(
        lambda: ebm.sample(KEY, ebm.fixed(plane, {"W": jnp.eye(3)}), 1),
        r"'W' was given a value of shape \(3, 3\).*\(2, 2\)",
    ),
    "fixed at a list": Mistake(
        lambda: ebm.sample(KEY, ebm.fixed(plane, {"W": [[1.0, 0.0], [0.0, 1.0]]}), 1),
        r"'W' was given a value of type `list`.*\(2, 2\)",
    ),
    "fixed at text": Mistake(
        lambda: ebm.sample(KEY, ebm.fixed(plane, {"W": "eye"}), 1),
        r"'W' was given a value of type `str`.*\(2, 2\)",
    ),
    "fixed by keyword": Mistake(lambda: ebm.fixed(plane, W=jnp.eye(2)), "dict of parameter values"),
    "fixed at a fit": Mistake(lambda: ebm.fixed(plane, [jnp.eye(2)]), "dict of parameter values"),
    "fixed, exchanged": Mistake(lambda: ebm.fixed(PARAMS, plane), "dict of parameter values"),
    "fixed without parameters": Mistake(lambda: ebm.fixed(plane), "dict of parameter values"),
    "sample what is not fixed": Mistake(
        lambda: ebm.sample(KEY, plane, 1), r"fixed\(model, params\)"
    ),
    "MALA on what is not fixed": Mistake(lambda: chain(ebm.MALA(plane)), r"fixed\(model, params\)"),
    "all is observed": Mistake(lambda: chain(ebm.MALA(FIXED), X), "no unobserved site"),
    "no draws": Mistake(lambda: ebm.sample(KEY, FIXED, 0), "`num_samples` must be a positive"),
    "draws as a float": Mistake(
        lambda: ebm.sample(KEY, FIXED, 1e2), "`num_samples` must be a positive"
    ),
    "no chains": Mistake(
        lambda: ebm.sample(KEY, FIXED, 1, num_chains=0), "`num_chains` must be a positive integer"
    ),
    "chains as a float": Mistake(
        lambda: ebm.sample(KEY, FIXED, 4, num_chains=2.0), "`num_chains` must be a positive integer"
    ),
    "a negative warm-up": Mistake(
        lambda: ebm.sample(KEY, FIXED, 1, num_warmup=-1), "`num_warmup` must be an integer"
    ),
    "key and model exchanged": Mistake(lambda: ebm.sample(FIXED, KEY, 1), ARGUMENTS),
    "key left out": Mistake(lambda: ebm.sample(FIXED, 10), "(rng_key|num_samples)", Exception),
    "a misspelt option of sample": Mistake(
        lambda: ebm.sample(KEY, FIXED, 1, num_warmups=3), "Did you mean `num_warmup`"
    ),
    "a kernel by name": Mistake(
        lambda: ebm.sample(KEY, FIXED, 1, kernel="nuts"), "`kernel` must be a NumPyro `MCMCKernel`"
    ),
    "a negative step": Mistake(
        lambda: ebm.MALA(FIXED, step_size=-1.0), "`step_size` must be positive"
    ),
    "data for a step": Mistake(lambda: ebm.MALA(FIXED, X), "`step_size` must be positive"),
    "blocks of names": Mistake(
        lambda: ebm.BlockGibbs(FIXED, blocks=["v", "h"]), "sequence of sequences of site names"
    ),
    "names for data": Mistake(
        lambda: ebm.sample(KEY, FIXED, 1, ["v"]), "the visible site 'v' are a `list`"
    ),
    "a kernel of another model": Mistake(
        lambda: ebm.sample(KEY, FIXED, 1, kernel=ebm.MALA(FIXED_BITS)), "moves continuous sites"
    ),
    "a step by name": Mistake(lambda: ebm.MALA(FIXED, step_size="auto"), "`step_size` must be"),
    "two for a probability": Mistake(
        lambda: ebm.MALA(FIXED, target_accept_prob=2.0), "must be between 0 and 1"
    ),
    "a flag that is a number": Mistake(
        lambda: ebm.MALA(FIXED, adapt_step_size=1), "`adapt_step_size` must be True or False"
    ),
    "MALA on bits": Mistake(lambda: chain(ebm.MALA(FIXED_BITS)), "DiscreteLangevin"),
    "DiscreteLangevin on real numbers": Mistake(
        lambda: chain(ebm.DiscreteLangevin(FIXED)), "'v'|discrete"
    ),
    "BlockGibbs on a quartic": Mistake(
        lambda: chain(ebm.BlockGibbs(QUARTIC)), "not jointly Gaussian.*MALA"
    ),
    "values of another name": Mistake(
        lambda: chain(ebm.MALA(FIXED), init_params={"x": X}), r"`init_params` names \['x'\]"
    ),
    "values of another shape": Mistake(
        lambda: chain(ebm.MALA(FIXED), init_params={"v": jnp.zeros((3, 5))}),
        r"`init_params`.*'v'.*\(3, 5\)",
    ),
    "values of another shape, BlockGibbs": Mistake(
        lambda: chain(ebm.BlockGibbs(FIXED_BITS), init_params={"v": jnp.zeros((3, 5))}),
        r"'v' the shape \(3, 5\), and .*\(1, 2\)",
    ),
    "values that are no dict": Mistake(
        lambda: chain(ebm.MALA(FIXED), init_params=X[:1]),
        r"must be a dict of values by site name, got an array of shape \(1, 2\)",
    ),
    "values of one chain for two": Mistake(
        lambda: ebm.sample(KEY, FIXED, 1, num_chains=2, init_params={"v": X[:1]}),
        r"'v' the shape \(1, 2\), and 2 chains start there",
    ),
    "values as text": Mistake(
        lambda: ebm.sample(KEY, FIXED, 1, init_params={"v": "zeros"}), "`v` must be an array of num"
    ),
    "a start of another shape": Mistake(
        lambda: chain(started(ebm.MALA, FIXED, v=jnp.zeros((3, 5)))),
        r"'v' was given a value of shape \(3, 5\), .* ask for \(1, 2\)",
    ),
    "a start that broadcasts": Mistake(
        lambda: chain(started(ebm.DiscreteLangevin, FIXED_BITS, v=1)),
        r"'v' .*shape \(\), .*\(1, 2\)",
    ),
    "a start as text": Mistake(
        lambda: chain(started(ebm.BlockGibbs, FIXED_BITS, v="on")), "'v' .* of type `str`"
    ),
    "a start of another name": Mistake(
        lambda: chain(started(ebm.MALA, FIXED, x=X)), r"`init_to_value` names \['x'\].*\['v'\]"
    ),
    "a start that is no dict": Mistake(
        lambda: chain(ebm.MALA(FIXED, init_strategy=init_to_value(values=X))),
        "must be a dict by site name, got an array",
    ),
    "a start of another shape, NUTS": Mistake(
        lambda: chain(started(NUTS, FIXED, v=jnp.zeros((3, 5)))), r"'v' .*\(3, 5\), .*\(1, 2\)"
    ),
    "a misspelt field": Mistake(
        lambda: chain(ebm.MALA(FIXED), extra_fields=("acept_prob",)),
        "no field 'acept_prob'.*accept",
    ),
    "a misspelt field, BlockGibbs": Mistake(
        lambda: chain(ebm.BlockGibbs(FIXED), extra_fields=("energies",)), "no field 'energies'"
    ),
    "a model for a kernel's": Mistake(lambda: ebm.MALA(PARAMS), "`model` must be a function"),
}
