# SPDX-License-Identifier: Apache-2.0
"""Every objective, from minibatches and from a stream: a run in two parts is one run."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from registry.objectives import OBJECTIVES

import numpyro_ebm as ebm

pytest.importorskip("orbax.checkpoint")

ROWS = np.random.default_rng(1).normal(0.2, 0.8, 48).astype(np.float32)
BITS = np.random.default_rng(2).integers(0, 2, (48, 3))


def real(data):
    precision = numpyro.param("precision", 1.0, constraint=dist.constraints.positive)
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", 0.5 * precision * v**2)


def bits(data):
    field, coupling = numpyro.param("field", jnp.zeros(3)), numpyro.param("coupling", 0.1)
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Counting(2, event_shape=(3,)), obs=data)
        ebm.energy("E", -v @ field - coupling * jnp.sum(v[..., 1:] * v[..., :-1], -1))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # runs as short as these are not judged
@pytest.mark.parametrize("source", ["minibatches", "stream"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_run_in_two_parts_is_one_run(name, source, tmp_path):
    entry = OBJECTIVES[name]
    model, rows = (real, ROWS) if entry.sites == "real" else (bits, BITS)
    batches = [rows[i : i + 16] for i in range(0, 48, 16)]

    def run(num_steps, **options):
        svi = ebm.EnergySVI(model, None, optax.adam(0.01), entry.make(None), num_rows=48)
        if source == "stream":
            data = lambda: iter(batches)  # noqa: E731
        else:
            data, options = rows, options | {"batch_size": 16}
        return svi.run(jax.random.key(5), num_steps, data, progress_bar=False, ema=0.9, **options)

    whole = run(11)
    run(6, checkpoint=tmp_path)
    parts = run(11, checkpoint=tmp_path)
    assert jax.tree.structure(parts) == jax.tree.structure(whole)
    for x, y in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
        assert jnp.array_equal(x, y, equal_nan=jnp.issubdtype(x.dtype, jnp.inexact))
    assert jnp.array_equal(parts.ema_params[min(parts.params)], whole.ema_params[min(whole.params)])
