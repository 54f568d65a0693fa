# SPDX-License-Identifier: Apache-2.0
"""Bars that compiled loops move."""

import jax
import jax.numpy as jnp
import numpyro
import pytest
from jax import lax

import numpyro_ebm as ebm
from numpyro_ebm.program import progress


class Bar:
    """What is used of tqdm, with all its updates."""

    made = []

    def __init__(self, desc, total, delay):
        self.desc, self.total, self.n, self.updates = desc, total, 0, []
        self.made.append(self)

    def update(self, num):
        self.n += int(num)
        self.updates.append(int(num))

    def close(self):
        self.closed = True


@pytest.fixture
def bars(monkeypatch):
    monkeypatch.setattr(progress, "tqdm", Bar)
    monkeypatch.setattr(Bar, "made", [])
    return Bar.made


def counting(watched):
    """A compiled loop of fifty steps that tells how far it is."""

    def step(carry, t):
        watched.reach((t + 1) / 50)
        return carry + t, None

    return jax.jit(lambda: lax.scan(step, 0, jnp.arange(50))[0])


def test_a_compiled_loop_moves_its_bar(bars):
    with progress.Progress("steps") as watched:
        counting(watched)()
    (bar,) = bars
    assert bar.n == 100 and len(bar.updates) == 50 and min(bar.updates) >= 0 and bar.closed


def test_what_nobody_watches_has_no_trace_of_it(bars):
    with progress.Progress("steps", shown=False) as watched:
        assert "callback" not in counting(watched).lower().as_text()

    @jax.jit
    def other(x):
        with progress.Progress("steps") as watched:
            return x + counting(watched)()

    assert other(1) == 1 + sum(range(50))
    assert bars == []


@pytest.mark.slow
def test_annealing_is_shown_where_it_is_asked_for(bars):
    def model():
        with numpyro.plate("data", 1):
            v = numpyro.sample("v", ebm.Counting(2, (2,)))
            ebm.energy("E", jnp.sum(v, -1) / 2)

    options = {"method": "ais", "num_particles": 64, "num_temperatures": 20}
    found = ebm.log_normalizer(jax.random.key(0), ebm.fixed(model, {}), **options)
    assert abs(found.value - 2 * jnp.log1p(jnp.exp(-0.5))) < 5 * found.mcse
    (bar,) = bars
    assert bar.desc == "log_normalizer (AIS)" and bar.n == 100 and len(bar.updates) == 20


@pytest.mark.slow
def test_the_kernel_of_stein_is_shown_where_it_is_asked_for(bars):
    def normal(data=None):
        with numpyro.plate("data", 1 if data is None else len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            ebm.energy("E", 0.5 * v**2)

    rows, model = jnp.linspace(-2.0, 2.0, 300), ebm.fixed(normal, {})
    silent = ebm.stein_test(jax.random.key(0), model, rows)
    assert bars == []
    shown = ebm.stein_test(jax.random.key(0), model, rows, progress_bar=True)
    (bar,) = bars
    assert bar.n == 300 and bar.closed and len(bar.updates) > 1
    assert float(shown.statistic) == pytest.approx(float(silent.statistic), rel=1e-5)
