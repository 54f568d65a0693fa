# SPDX-License-Identifier: Apache-2.0
"""What the tests share: double precision, a small GRBM with closed forms in NumPy, error bars."""

import gc
import importlib.metadata
import os
from collections import Counter
from types import SimpleNamespace

# Three quarters of the suite's time is compilation, of programs that run for a moment: compile them
# quickly, and in one thread. XLA reads this when JAX is first used, which importing BlackJAX does.
# Flags that are set already stay.
QUICK = ["--xla_backend_optimization_level=0", "--xla_cpu_parallel_codegen_split_count=1"]
if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11):
    QUICK.append("--xla_cpu_use_fusion_emitters=false")  # unknown to later versions
os.environ.setdefault("XLA_FLAGS", " ".join(QUICK))

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from marks import LONGEST, ONE_IN, WHOLE
from members import MEMBERS
from numpyro.diagnostics import effective_sample_size

import numpyro_ebm as ebm

# Tracing makes many small objects, and there are no cycles to speak of: look for them rarely.
gc.freeze()
gc.set_threshold(100_000, 20, 50)

collect_ignore = ["svi/devices_program.py"]  # run by test_devices.py, in processes of its own


@pytest.hookimpl(tryfirst=True)  # before tests are picked by their marks
def pytest_collection_modifyitems(items):
    num_slow = Counter()  # members of a law so far
    for item in items:
        if isinstance(item, pytest.DoctestItem):  # two minutes in all
            item.add_marker(pytest.mark.slow)
        law, _, member = item.nodeid.partition("[")
        words = next((words for name, words in MEMBERS.items() if law.endswith(name)), None)
        if words is not None and not any(word in "[" + member for word in words):
            item.add_marker(pytest.mark.slow)
        if item.get_closest_marker("slow") is None:
            continue
        num_slow[law] += 1
        is_left_out = num_slow[law] % ONE_IN != 1 and not law.endswith(WHOLE)
        if is_left_out or any(name in item.nodeid for name in LONGEST):
            item.add_marker(pytest.mark.longest)


def enable_x64():
    """Double precision inside of a ``with``, under the names of older and newer JAX."""
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    from jax.experimental import enable_x64

    return enable_x64(True)


@pytest.fixture
def x64():
    """The whole test in double precision."""
    with enable_x64():
        yield


def grbm_model(data=None, *, num_visible=2, num_hidden=3):
    """GRBM with all hidden units in one event dimension."""
    W = numpyro.param("W", lambda key: 0.1 * jax.random.normal(key, (num_visible, num_hidden)))
    b = numpyro.param("b", jnp.zeros(num_visible))
    c = numpyro.param("c", jnp.zeros(num_hidden))
    scale = numpyro.param("scale", jnp.ones(num_visible), constraint=dist.constraints.positive)
    with numpyro.plate("data", 1 if data is None else len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(event_shape=(num_visible,)), obs=data)
        h = numpyro.sample("h", ebm.Counting(num_values=2, event_shape=(num_hidden,)))
        ebm.energy("E", 0.5 * jnp.sum(((v - b) / scale) ** 2, -1) - h @ c - jnp.sum(v @ W * h, -1))


def grbm_plate_model(data=None, *, num_visible=2, num_hidden=3):
    """The same density with the hidden units in a plate of their own, so that it factorises."""
    W = numpyro.param("W", lambda key: 0.1 * jax.random.normal(key, (num_visible, num_hidden)))
    b = numpyro.param("b", jnp.zeros(num_visible))
    c = numpyro.param("c", jnp.zeros(num_hidden))
    scale = numpyro.param("scale", jnp.ones(num_visible), constraint=dist.constraints.positive)
    units = numpyro.plate("units", num_hidden, dim=-2)
    with numpyro.plate("data", 1 if data is None else len(data), dim=-1):
        v = numpyro.sample("v", ebm.Lebesgue(event_shape=(num_visible,)), obs=data)
        ebm.energy("E", 0.5 * jnp.sum(((v - b) / scale) ** 2, -1))
        with units:
            h = numpyro.sample("h", ebm.Counting(num_values=2), infer={"enumerate": "parallel"})
            ebm.energy("E_h", -h * (c[:, None] + W.T @ v.T))


def grbm_guide(data=None, *, num_visible=2, num_hidden=3):
    """q(h | v) = Bernoulli(d + v A); the exact posterior at A = W, d = c."""
    A = numpyro.param("A", jnp.zeros((num_visible, num_hidden)))
    d = numpyro.param("d", jnp.zeros(num_hidden))
    with numpyro.plate("data", len(data)):
        v = ebm.visible("v", data)
        numpyro.sample("h", dist.Bernoulli(logits=v @ A + d).to_event(1))


class GRBMOracle:
    """Closed forms of a small GRBM, by enumeration in NumPy (float64) and nothing else."""

    def __init__(self, params):
        self.W, self.b, self.c, self.scale = (params[k] for k in ("W", "b", "c", "scale"))
        num_hidden = len(self.c)
        self.states = (np.arange(2**num_hidden)[:, None] >> np.arange(num_hidden)) & 1

    def log_joint(self, v, h):
        """log p̃(v, h), of shape (...,)."""
        v, h = np.asarray(v, float), np.asarray(h, float)
        bowl = 0.5 * np.sum(((v - self.b) / self.scale) ** 2, -1)
        return h @ self.c + np.sum((v @ self.W) * h, -1) - bowl

    def log_states(self, v):
        """log p̃(v, h) at every h, of shape (states, rows)."""
        return self.log_joint(np.asarray(v, float)[None], self.states[:, None])

    def log_marginal(self, v):
        """log Σ_h p̃(v, h), of shape (rows,)."""
        return np.logaddexp.reduce(self.log_states(v), axis=0)

    def posterior_mean(self, v):
        """E[h | v], of shape (rows, hidden)."""
        return 1 / (1 + np.exp(-(self.c + np.asarray(v, float) @ self.W)))

    def score(self, v):
        """∇_v log p̃(v), of shape (rows, visible)."""
        v = np.asarray(v, float)
        return -(v - self.b) / self.scale**2 + self.posterior_mean(v) @ self.W.T

    def state_probabilities(self):
        """p(h), of shape (states,)."""
        shift = self.states @ self.W.T
        quadratic = 0.5 * np.sum((shift * self.scale) ** 2, -1)
        log_weights = self.states @ self.c + shift @ self.b + quadratic
        return np.exp(log_weights - np.logaddexp.reduce(log_weights))

    def moments(self):
        """E[v], E[v vᵀ] and E[h] of the model."""
        p = self.state_probabilities()
        means = self.b + self.scale**2 * (self.states @ self.W.T)  # E[v | h]
        second = np.einsum("s,si,sj->ij", p, means, means) + np.diag(self.scale**2)
        return p @ means, second, p @ self.states


@pytest.fixture(scope="session")
def grbm():
    """A GRBM with 2 visible and 3 hidden units: models, guide, parameters, 5 rows, oracle.

    The numbers are NumPy arrays in float64, for tests in either precision.
    """
    rng = np.random.default_rng(0)
    params = {
        "W": rng.normal(size=(2, 3)),
        "b": np.array([0.3, -0.2]),
        "c": np.array([0.5, -0.4, 0.1]),
        "scale": np.array([0.8, 1.1]),
    }
    return SimpleNamespace(
        model=grbm_model,
        plate_model=grbm_plate_model,
        guide=grbm_guide,
        params=params,
        exact_guide_params={"A": params["W"], "d": params["c"]},
        data=rng.normal(size=(5, 2)),
        oracle=GRBMOracle(params),
    )


def assert_mean(draws, expected, *, num_errors=4.0, min_ess=100):
    """The mean of Markov chain draws equals ``expected`` within standard errors from their ESS.

    :param draws: of shape (chains, draws, ...).
    """
    draws = np.asarray(draws, float)
    ess = effective_sample_size(draws)
    assert np.all(ess >= min_ess), f"too few effective draws to tell: {ess}"
    error = np.std(draws, axis=(0, 1)) / np.sqrt(ess)
    z = (np.mean(draws, axis=(0, 1)) - expected) / error
    assert np.all(np.abs(z) < num_errors), f"off by {z} standard errors"
