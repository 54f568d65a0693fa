# SPDX-License-Identifier: Apache-2.0
"""Every name of NumPyro, JAX, BlackJAX and ArviZ that their documentation does not promise.

The rest of the package takes them from here, so that a new release which moves one is mended in one
place; ``tests/test_compat.py`` names it.
"""

import sys
from typing import Any

from blackjax.adaptation.mass_matrix import welford_algorithm
from blackjax.adaptation.staged_adaptation import build_schedule
from blackjax.adaptation.step_size import dual_averaging_adaptation
from blackjax.base import SamplingAlgorithm, build_sampling_algorithm
from blackjax.diagnostics import psis_weights
from blackjax.mcmc import proposal
from blackjax.mcmc.adjusted_mclmc_dynamic import trajectory_length
from blackjax.mcmc.diffusions import DiffusionState, overdamped_langevin
from blackjax.mcmc.ghmc import GHMCState
from blackjax.mcmc.hmc import HMCState
from blackjax.mcmc.integrators import IntegratorState
from blackjax.mcmc.mala import MALAState
from blackjax.smc.ess import ess_solver
from blackjax.smc.resampling import systematic
from blackjax.smc.solver import dichotomy
from blackjax.util import generate_gaussian_noise, generate_unit_vector
from jax.core import ShapedArray, Tracer, eval_jaxpr
from jax.experimental.xla_metadata import set_xla_metadata
from jax.extend.core import ClosedJaxpr, Literal, get_opaque_trace_state, jaxpr_as_fun
from jax.extend.random import define_prng_impl, threefry_prng_impl
from numpyro.distributions import Distribution
from numpyro.infer.gibbs import GIBBS_SITES_KWARG
from numpyro.infer.util import unconstrain_fn
from numpyro.ops.provenance import eval_provenance, track_deps_jaxpr
from numpyro.primitives import _PYRO_STACK, apply_stack
from numpyro.util import find_stack_level, is_prng_key, not_jax_tracer

__all__ = [
    "GIBBS_SITES_KWARG",
    "ClosedJaxpr",
    "DiffusionState",
    "GHMCState",
    "HMCState",
    "IntegratorState",
    "Literal",
    "MALAState",
    "SamplingAlgorithm",
    "ShapedArray",
    "Tracer",
    "apply_stack",
    "build_sampling_algorithm",
    "build_schedule",
    "define_prng_impl",
    "dichotomy",
    "dual_averaging_adaptation",
    "ess_solver",
    "eval_jaxpr",
    "eval_provenance",
    "failed_statement",
    "find_stack_level",
    "generate_gaussian_noise",
    "generate_unit_vector",
    "handler_stack",
    "is_dropped",
    "is_enumerating",
    "is_inspected",
    "is_prng_key",
    "jaxpr_as_fun",
    "mask_of",
    "not_jax_tracer",
    "overdamped_langevin",
    "proposal",
    "psis_weights",
    "run_arguments",
    "set_xla_metadata",
    "systematic",
    "threefry_prng_impl",
    "trace_state",
    "undrawable_statement",
    "track_deps_jaxpr",
    "trajectory_length",
    "unconstrain_fn",
    "welford_algorithm",
]

handler_stack: list[Any] = _PYRO_STACK
"""The handlers that are active, the outermost first."""


def is_enumerating() -> bool:
    """Whether NumPyro's funsor handlers are enumerating the model that is running now."""
    # Whoever enumerates has imported it; the import takes a fifth of a second.
    module = sys.modules.get("numpyro.contrib.funsor.enum_messenger")
    return module is not None and any(
        isinstance(handler, module.BaseEnumMessenger) for handler in handler_stack
    )


def failed_statement(error: BaseException) -> tuple[str, Any, list[Any]] | None:
    """Name, distribution and plates of the statement that NumPyro's `plate` could not expand."""
    traceback, found = error.__traceback__, None
    while traceback is not None:
        names = traceback.tb_frame.f_locals
        if traceback.tb_frame.f_code.co_name == "process_message" and "expected_shape" in names:
            msg = names["msg"]
            found = msg["name"], msg["fn"], list(msg["cond_indep_stack"])
        traceback = traceback.tb_next
    return found


def undrawable_statement(error: BaseException) -> tuple[str, Any] | None:
    """Name of the `sample` statement that was given no distribution, and what it was given."""
    traceback, found = error.__traceback__, None
    while traceback is not None:
        code, names = traceback.tb_frame.f_code, traceback.tb_frame.f_locals
        if code.co_name == "sample" and "obs_mask" in names and "fn" in names:
            is_one = isinstance(names["fn"], Distribution)
            found = None if is_one else (names["name"], names["fn"])
        traceback = traceback.tb_next
    return found


def trace_state() -> Any:
    """What is equal as long as no `jit`, `scan` or other transformation of JAX begins or ends."""
    return get_opaque_trace_state(convention="flax")


def is_inspected() -> bool:
    """Whether `numpyro.render_model` runs the model to see what depends on what."""
    return any(type(h).__module__ == "numpyro.infer.inspect" for h in handler_stack)


def is_dropped(variable: Any) -> bool:
    """Whether a variable of a jaxpr stands for a result that is thrown away."""
    return type(variable).__name__ == "DropVar"  # `jax.extend.core` has it from JAX 0.10 on


def mask_of(distribution: Any) -> Any:
    """The mask of a `MaskedDistribution`: a boolean, or an array of them."""
    return distribution._mask


def run_arguments(mcmc: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments with which an `MCMC` has run."""
    return mcmc._args, mcmc._kwargs
