# SPDX-License-Identifier: Apache-2.0
"""What ``test_devices.py`` runs in processes with several devices: results, and where they lie.

python devices_program.py DEVICES [PROCESS PORT]
"""

import json
import os
import sys

num_devices, *where = map(int, sys.argv[1:])
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={num_devices}"

import jax  # noqa: E402

if where:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{where[1]}", 2, where[0])

from functools import partial  # noqa: E402

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import numpyro  # noqa: E402
import optax  # noqa: E402
from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: E402

import numpyro_ebm as ebm  # noqa: E402

D = 6
ROWS = np.random.default_rng(0).normal(0.3, 1.0, (192, D)).astype(np.float32)
MESH = Mesh(np.array(jax.devices()), ("rows",))
SHARDING = NamedSharding(MESH, PartitionSpec("rows"))


def model(data=None, rows=1):
    W = numpyro.param("W", lambda key: 0.1 * jax.random.normal(key, (D, 8)))
    with numpyro.plate("data", rows if data is None else len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(event_shape=(D,)), obs=data)
        hidden = jnp.sum(jax.nn.softplus(v @ W), -1)
        ebm.energy("E", 0.5 * jnp.sum((v - 0.3) ** 2, -1) - hidden)


def latent(data):
    W = numpyro.param("W", lambda key: 0.1 * jax.random.normal(key, (D, 8)))
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(event_shape=(D,)), obs=data)
        h = numpyro.sample("h", ebm.Counting(2, event_shape=(8,)))
        ebm.energy("E", 0.5 * jnp.sum((v - 0.3) ** 2, -1) - jnp.sum((v @ W) * h, -1))


def guide(data):
    A = numpyro.param("A", jnp.zeros((D, 8)))
    with numpyro.plate("data", len(data)):
        v = ebm.visible("v", data)
        numpyro.sample("h", numpyro.distributions.Bernoulli(logits=v @ A).to_event(1))


OBJECTIVES = {
    "VaGES": lambda: ebm.DenoisingScoreMatching(0.2, ebm.VaGES(4)),
    "DSM": lambda: ebm.DenoisingScoreMatching(0.2),
    "PCD": lambda: ebm.ContrastiveDivergence(
        partial(ebm.ULA, step_size=3e-3), 2, persistent=True, reset_probability=0.1
    ),
}


def share(x):
    """Which share of an array the first device holds."""
    return x.addressable_shards[0].data.size / x.size


def new(objective):
    parts = (latent, guide) if objective == "VaGES" else (model, None)
    return ebm.EnergySVI(*parts, optax.adam(1e-2), OBJECTIVES[objective]())


def fit(objective, data, **options):
    svi = new(objective)
    fit = svi.run(jax.random.key(1), 30, data, progress_bar=False, **options)
    told = {"losses": np.asarray(fit.losses).tolist(), "W": float(jnp.sum(fit.params["W"] ** 2))}
    kept = fit.state.objective_state
    if kept is not None:
        told["chains"] = share(jax.tree.leaves(kept.position)[0])
    return told


def batches():
    return (ROWS[i : i + 32] for i in range(0, 192, 32))


def here(rows):
    """The rows as an array of which every process has its part."""
    mine = slice(96 * where[0], 96 * (where[0] + 1)) if where else slice(None)
    return jax.make_array_from_process_local_data(SHARDING, rows[mine])


found = {}
for name in OBJECTIVES:
    found[name] = fit(name, ROWS, batch_size=32, sharding=MESH)
found["own"] = fit("DSM", here(ROWS), batch_size=32)
found["stream"] = fit("DSM", batches, sharding=MESH)
if not where:
    found["all rows"] = fit("DSM", ROWS, sharding=SHARDING)
    fixed = ebm.fixed(model, {"W": 0.1 * jax.random.normal(jax.random.key(0), (D, 8))})
    draws = ebm.sample(
        jax.random.key(2), fixed, 16, num_chains=16, num_warmup=20, kernel=ebm.MALA, sharding=MESH
    )["v"]
    found["draws"] = {"values": np.asarray(draws[:, 0, 0]).tolist(), "share": share(draws)}
    log_z = ebm.log_normalizer(
        jax.random.key(3), fixed, method="ais", num_particles=64, num_temperatures=50, sharding=MESH
    )
    found["log Z"] = float(log_z.value), float(log_z.mcse)
    # Axes that ask a model for the sharding of every result.
    explicit = jax.make_mesh((num_devices,), ("rows",))
    spread = jax.device_put(ROWS, NamedSharding(explicit, PartitionSpec("rows")))
    svi = new("DSM")
    state = svi.init(jax.random.key(1), spread)
    found["update"] = [float(svi.update(state, x)[1]) for x in (spread, ROWS)]

    def under_mesh(**options):
        with jax.set_mesh(explicit):
            fit("DSM", spread, batch_size=32, **options)

    def draw_under_mesh():
        with jax.set_mesh(explicit):
            ebm.sample(jax.random.key(2), fixed, 8, num_chains=8, kernel=ebm.MALA, sharding=MESH)

    found["refused"] = []
    for call in (
        partial(jax.jit(svi.update), state, spread),
        under_mesh,
        partial(under_mesh, sharding=MESH),
        draw_under_mesh,
    ):
        try:
            call()
        except ebm.ModelError as error:
            found["refused"].append(str(error))
print("FOUND", json.dumps(found))
