# SPDX-License-Identifier: Apache-2.0
"""Mistakes with the options of calls that infer parameters."""

import jax.numpy as jnp
from mistakes.setting import (
    ARGUMENTS,
    KEY,
    LINE,
    Mistake,
    X,
    bayesian,
    chain,
    fit,
    plane,
    quartic,
    started,
)
from numpyro.infer import MCMC, NUTS, init_to_value

import numpyro_ebm as ebm

SM = ebm.ScoreMatching


def posterior(model, data=LINE):
    return chain(NUTS(model), data)


def calibrated(route=None, model=bayesian, simulate=None):
    route = (lambda key, data: {"theta": jnp.ones(5)}) if route is None else route
    simulate = (lambda key, params: {"v": LINE}) if simulate is None else simulate
    return ebm.simulation_based_calibration(
        KEY, model, route, 3, LINE, num_draws=3, simulate=simulate, progress_bar=False
    )


POSTERIORS = {
    "a sum over real numbers": Mistake(
        lambda: posterior(ebm.normalized(quartic)), "'enumerate' does not apply"
    ),
    "a misspelt method": Mistake(
        lambda: ebm.normalized(bayesian, "enumrate"), "'enumerate' or 'quadrature', got 'enumrate'"
    ),
    "no priors": Mistake(lambda: posterior(ebm.normalized(plane), X), "no parameter.*has a prior"),
    "no priors, generalized": Mistake(
        lambda: posterior(ebm.generalized(plane, SM()), X), "no parameter.*has a prior"
    ),
    "log Z for a function of it": Mistake(
        lambda: posterior(ebm.normalized(bayesian, 0.9), LINE), "function of the parameters"
    ),
    "data for log Z": Mistake(lambda: ebm.normalized(bayesian, LINE), "`log_normalizer` must be"),
    "a class of objectives": Mistake(
        lambda: ebm.generalized(bayesian, SM), "must be an objective such as"
    ),
    "no auxiliary steps": Mistake(
        lambda: ebm.Exchange(bayesian, ebm.MALA, 0), "`num_auxiliary_steps` must be a positive"
    ),
    "log Z of another shape": Mistake(
        lambda: posterior(ebm.normalized(bayesian, lambda p: jnp.ones(7))), r"shape \(7,\)"
    ),
    "log Z of another parameter": Mistake(
        lambda: posterior(ebm.normalized(bayesian, lambda p: p["beta"])),
        r"no parameter 'beta'.*\['theta'\]",
    ),
    "an objective's name": Mistake(
        lambda: ebm.generalized(bayesian, "sm"), "`objective` must be an objective"
    ),
    "a negative rate": Mistake(
        lambda: ebm.generalized(bayesian, SM(), learning_rate=-1), "`learning_rate` must be"
    ),
    "Exchange with a kernel that wants more": Mistake(
        lambda: chain(ebm.Exchange(bayesian, ebm.ULA), LINE),
        "missing.*'step_size'",
        TypeError,
    ),
    "Exchange without data": Mistake(
        lambda: chain(ebm.Exchange(bayesian, ebm.MALA)), "observes nothing"
    ),
    "fictitious data of another shape": Mistake(
        lambda: chain(ebm.Exchange(bayesian, lambda key, p: {"v": jnp.ones(3)}), LINE),
        r"shapes \{'v': \(6,\)\}, got \{'v': \(3,\)\}",
    ),
    "fictitious data of another name": Mistake(
        lambda: chain(ebm.Exchange(bayesian, lambda key, p: {"x": LINE}), LINE),
        r"got \{'x': \(6,\)\}",
    ),
    "a start that broadcasts, normalized": Mistake(
        lambda: chain(started(NUTS, ebm.normalized(bayesian), theta=jnp.ones(6)), LINE),
        r"'theta' was given a value of shape \(6,\), .* ask for \(\)",
    ),
    "a start that broadcasts, generalized": Mistake(
        lambda: chain(NUTS(ebm.generalized(bayesian, SM())), LINE, init_params={"theta": LINE}),
        r"'theta' was given a value of shape \(6,\), .* ask for \(\)",
    ),
    "a start of another shape, Exchange": Mistake(
        lambda: chain(ebm.Exchange(bayesian, ebm.MALA), LINE, init_params={"theta": LINE}),
        r"'theta' the shape \(6,\), and .*\(\)",
    ),
    "a start of another name, Exchange": Mistake(
        lambda: chain(
            ebm.Exchange(bayesian, ebm.MALA, init_strategy=init_to_value(values={"beta": 1.0})),
            LINE,
        ),
        r"`init_to_value` names \['beta'\].*\['theta'\]",
    ),
    "a posterior for a model": Mistake(
        lambda: ebm.log_likelihood(KEY, ebm.normalized(bayesian), LINE),
        r"`normalized\(model\)` is a posterior of parameters",
    ),
    "a posterior for a model, EnergySVI": Mistake(
        lambda: fit(ebm.generalized(bayesian, SM()), data=LINE), r"`generalized\(model\)` is a post"
    ),
    "a posterior for a model, calibration": Mistake(
        lambda: calibrated(model=ebm.normalized(bayesian)), r"`normalized\(model\)` is a posterior"
    ),
    "a class of kernels, calibration": Mistake(
        lambda: calibrated(NUTS), r"the class `NUTS`.*`NUTS\(normalized\(model\)\)`"
    ),
    "a model for a route": Mistake(
        lambda: calibrated(bayesian), r"`route` is called with \(rng_key, \*args"
    ),
    "a run for a route": Mistake(
        lambda: calibrated(MCMC(NUTS(bayesian), num_warmup=1, num_samples=1)),
        "`route` must be a function or a `MCMCKernel`",
    ),
    "simulated data of a key alone": Mistake(
        lambda: calibrated(simulate=lambda key: {"v": LINE}), r"called with \(rng_key, params\)"
    ),
    "simulated data without a name": Mistake(
        lambda: calibrated(simulate=lambda key, params: LINE), r"a dict of \['v'\], got an array"
    ),
    "no names": Mistake(lambda: ebm.given(bayesian, "theta"), "sequence of names"),
    "predictive, exchanged": Mistake(
        lambda: ebm.predictive(bayesian, KEY, {"theta": jnp.ones(2)}), ARGUMENTS
    ),
    "predictive of other parameters": Mistake(
        lambda: ebm.predictive(KEY, bayesian, {"beta": jnp.ones(2)}), "theta"
    ),
}
