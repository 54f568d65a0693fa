# SPDX-License-Identifier: Apache-2.0
"""Constructors with values that their signatures do not allow: all are refused by name."""

import collections.abc
import inspect
import types
import typing
from typing import Any

import jax
import numpy as np
import numpyro.distributions as dist
import optax
import pytest
from jax.typing import ArrayLike
from numpyro.distributions import constraints

import numpyro_ebm as ebm
from numpyro_ebm.signatures import checked

MODEL = ebm.fixed(lambda: None, {})
REQUIRED = {
    "model": MODEL,
    "kernel": ebm.BlockGibbs,
    "noise": dist.Normal(0.0, 1.0),
    "flow": dist.Normal(0.0, 1.0),
    "noise_scale": 0.3,
    "noise_scales": 0.3,
    "num_steps": 2,
    "num_particles": 4,
    "num_values": 2,
    "auxiliary": "enumerate",
    "optim": optax.adam(0.1),
    "loss": ebm.ScoreMatching(),
    "guide": None,
    "path": "folder",
    "sites": ["v"],
    "step_size": 0.1,
    "objective": ebm.ScoreMatching(),
    "log_normalizer": "enumerate",
}
OPTIONS = {
    "AnnealedLangevin": {"inverse_temperatures": [0.5, 1.0], "step_size": 0.1},
    "fixed": {"params": {}},
    "given": {"names": ["v"]},
}
SIGNED = {"init_log_normalizer"}
MAY_BE_ZERO = {"reset_probability", "energy_penalty", "likelihood_weight", "w", "num_steps"}

NO_NUMBERS = ("many", "", object(), {}, lambda x: x)
NO_OBJECTS = (np.nan, np.inf, -1, 0, 2.5, True, object(), [], {}, (1, 2))
WRONG = {
    bool: (0, 1, 2.5, np.nan, "yes", None, object(), [], {}, lambda x: x),
    int: (np.nan, np.inf, -1, 2.5, True, None, [], (1, 2), np.int64(-3), *NO_NUMBERS),
    float: (np.nan, -1.0, True, None, [], (1, 2), *NO_NUMBERS),
    ArrayLike: (np.nan, -1.0, None, *NO_NUMBERS),
    collections.abc.Callable: NO_OBJECTS,
    str: NO_OBJECTS,
    constraints.Constraint: NO_OBJECTS,
}


def public_classes():
    for name in sorted(set(ebm.__all__)):
        x = getattr(ebm, name)
        if inspect.isclass(x) and not issubclass(x, Exception):
            yield name


def wrong_values(name, hint):
    """Values that an argument of this name and annotation cannot have."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    kinds = typing.get_args(hint) if is_union else (hint,)
    if set(typing.get_args(ArrayLike)) <= set(kinds) or hint == ArrayLike:
        kinds = (ArrayLike,)
    kinds = [collections.abc.Callable if "Callable" in str(kind) else kind for kind in kinds]
    if any(kind is not type(None) and kind not in WRONG for kind in kinds):
        return []
    kinds = [kind for kind in kinds if kind is not type(None)]
    found = [x for x in WRONG[kinds[0]] if all(any(x is y for y in WRONG[k]) for k in kinds)]
    if type(None) in (typing.get_args(hint) or ()):
        found = [x for x in found if x is not None]
    if name in SIGNED:
        found = [x for x in found if not (isinstance(x, float) and x == -1.0)]
    return found


@pytest.mark.parametrize("name", list(public_classes()))
def test_what_a_constructor_cannot_take_is_refused_by_name(name):
    make = getattr(ebm, name)
    parameters = inspect.signature(make.__init__).parameters
    hints = typing.get_type_hints(make.__init__)
    needed = [
        k
        for k, p in parameters.items()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    given = {k: REQUIRED[k] for k in needed if k in REQUIRED} | OPTIONS.get(name, {})
    if not set(needed) - {"self"} <= given.keys():
        pytest.skip(f"{name} is made by others")
    make(**given)
    for argument, hint in hints.items():
        if argument not in parameters:
            continue
        for wrong in wrong_values(argument, hint):
            with pytest.raises(ebm.ModelError, match=argument):
                make(**{**given, argument: wrong})
                pytest.fail(f"{name}({argument}={wrong!r}) was taken")


def test_an_annotation_is_what_is_taken():
    @checked
    def function(flag: bool = False, count: int | None = None, x: ArrayLike = 1.0, *rest: Any):
        return flag, count, x

    assert function(np.bool_(True), np.int64(3)) == (True, 3, 1.0)
    jax.jit(lambda x: function(x=x)[2])(2.0)  # a traced number
    for wrong, words in (
        ({"flag": 1}, "function: `flag` must be True or False, got 1"),
        ({"count": 2.0}, "function: `count` must be an integer or `None`, got 2.0"),
        ({"x": "1"}, "function: `x` must be a number or an array, got '1'"),
    ):
        with pytest.raises(ebm.ModelError, match=words):
            function(**wrong)
    with pytest.raises(TypeError, match="unexpected keyword"):
        function(other=1)


def test_every_public_function_of_a_key_looks_at_its_arguments():
    modules = ebm, ebm.datasets, ebm.diagnostics, ebm.mcmc, ebm.plots
    functions = {
        name: getattr(module, name)
        for module in modules
        for name in module.__all__
        if inspect.isfunction(getattr(module, name))
    }
    of_keys = {k: f for k, f in functions.items() if "rng_key" in inspect.signature(f).parameters}
    assert len(of_keys) > 20
    plain = [k for k, f in of_keys.items() if inspect.unwrap(f) is f]
    assert plain == [], "decorate them by `numpyro_ebm.signatures.explaining`"
