# SPDX-License-Identifier: Apache-2.0
"""Mistakes with the options of calls that judge a model."""

import jax.numpy as jnp
import numpy as np
from mistakes.setting import (
    ARGUMENTS,
    FIXED,
    KEY,
    PARAMS,
    Mistake,
    X,
    chain,
    line,
    model_of,
    plane,
)
from numpyro.infer import MCMC

import numpyro_ebm as ebm

DRAWS = {"v": X[:, None]}
DIAGNOSTICS = {
    "log_likelihood of what is not fixed": Mistake(
        lambda: ebm.log_likelihood(KEY, plane, X), r"fixed\(model, params\)"
    ),
    "log_likelihood without data": Mistake(
        lambda: ebm.log_likelihood(KEY, FIXED), "no observed site"
    ),
    "log Z of another shape, log_likelihood": Mistake(
        lambda: ebm.log_likelihood(KEY, FIXED, X, log_normalizer=jnp.ones(3)), r"shape \(3,\)"
    ),
    "a run that has not been run": Mistake(
        lambda: ebm.to_arviz(MCMC(ebm.MALA(FIXED), num_warmup=1, num_samples=1)), "has not been run"
    ),
    "draws without their model": Mistake(lambda: ebm.to_arviz({"v": X}), "model"),
    "too few dimensions for to_arviz": Mistake(
        lambda: ebm.to_arviz(DRAWS, FIXED, dims={"v": ["x"]}),
        r"`dims` of 'v' must be a list of names for \['data', 'v_dim_0'\], .*got \['x'\]",
    ),
    "a word for a dimension": Mistake(
        lambda: ebm.to_arviz(DRAWS, FIXED, dims={"v": "xy"}), "must be a list of names"
    ),
    "dimensions of no array": Mistake(
        lambda: ebm.to_arviz(DRAWS, FIXED, dims={"w": ["x"]}), "names 'w', and there are .*v"
    ),
    "a dimension with the name of another": Mistake(
        lambda: ebm.to_arviz(DRAWS, FIXED, dims={"v": ["draw", "x"]}), "each another, got"
    ),
    "coordinates of no dimension": Mistake(
        lambda: ebm.to_arviz(DRAWS, FIXED, coords={"x": [1, 2]}), "'x', which is none of"
    ),
    "too many coordinates": Mistake(
        lambda: ebm.to_arviz(DRAWS, FIXED, coords={"v_dim_0": [1, 2, 3]}),
        "3 labels for the dimension 'v_dim_0', which is of .2.",
    ),
    "log Z and its error": Mistake(
        lambda: ebm.log_likelihood(KEY, FIXED, X, log_normalizer=(1.0, 0.1)),
        r"has shape \(2,\); it is a number",
    ),
    "log Z by name": Mistake(
        lambda: ebm.log_likelihood(KEY, FIXED, X, log_normalizer="quadrature"),
        "`log_normalizer` must be a number, an array",
    ),
    "a test of one row": Mistake(lambda: ebm.stein_test(KEY, FIXED, X[:1]), "there is only one"),
    "a test of parameters": Mistake(
        lambda: ebm.stein_test(KEY, PARAMS, X), "`model` must be a function"
    ),
    "a test of what is not fixed": Mistake(
        lambda: ebm.stein_test(KEY, plane, X), r"free parameter\(s\) \['W'\]"
    ),
    "stein_test, exchanged": Mistake(lambda: ebm.stein_test(FIXED, KEY, X), ARGUMENTS),
    "log_normalizer, exchanged": Mistake(lambda: ebm.log_normalizer(FIXED, KEY), ARGUMENTS),
    "log_likelihood, exchanged": Mistake(lambda: ebm.log_likelihood(FIXED, KEY, X), ARGUMENTS),
    "a misspelt method": Mistake(
        lambda: ebm.log_normalizer(KEY, FIXED, method="enum"), "`method` must be one of enumerate"
    ),
    "a misspelt option": Mistake(
        lambda: ebm.log_normalizer(KEY, FIXED, num_particle=3), "Did you mean `num_particles`"
    ),
    "no particles": Mistake(
        lambda: ebm.log_normalizer(KEY, FIXED, num_particles=0), "`num_particles` must be"
    ),
    "an integral that diverges": Mistake(
        lambda: ebm.log_normalizer(
            KEY, ebm.fixed(model_of(ebm.Lebesgue, lambda v, W: -(v**2)), PARAMS), method="enumerate"
        ),
        "'v'",
    ),
    "a toy's arguments exchanged": Mistake(
        lambda: ebm.datasets.checkerboard(100, KEY),
        "num_samples must be a positive.*random key",
    ),
    "a toy without a key": Mistake(lambda: ebm.datasets.moons(0, 10), "`rng_key` must be"),
    "a picture of one coordinate": Mistake(
        lambda: ebm.plots.density(ebm.fixed(line, {"m": 0.0})), "event_shape"
    ),
    "a temperature below zero": Mistake(lambda: ebm.temper(FIXED, -1.0), "inverse_temperature"),
    "temperatures": Mistake(lambda: ebm.temper(FIXED, np.ones(3)), "must be a scalar"),
    "integrated over no site": Mistake(
        lambda: chain(ebm.MALA(ebm.integrated(FIXED, ["x"]))), r"no site\(s\) \['x'\]"
    ),
}
