# SPDX-License-Identifier: Apache-2.0
"""Rows, chains and particles on several devices, and in several processes: the same results."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import numpyro
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import numpyro_ebm as ebm
from numpyro_ebm.program.devices import (
    check_divides,
    everywhere,
    leading_sharding,
    on_axis,
    placed,
)

PROGRAM = str(Path(__file__).with_name("devices_program.py"))


def started(*arguments):
    command = [sys.executable, PROGRAM, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def told(process):
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    return json.loads(out.partition("FOUND")[2])


def assert_close(found, expected, names):
    for name in names:
        for what in ("losses", "W"):
            np.testing.assert_allclose(
                found[name][what], expected[name][what], rtol=2e-5, atol=2e-6
            )


def test_rows_lead_where_they_are_spread():
    """By a mesh, a sharding, or the first of the data that has one."""
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("a", "b"))
    both, one = PartitionSpec(("a", "b")), NamedSharding(mesh, PartitionSpec("b", None))
    assert leading_sharding("sample", mesh).spec == both
    assert leading_sharding("sample", one).spec == PartitionSpec("b")
    data = {"x": np.ones((2, 2)), "y": jax.device_put(np.ones((2, 2)), one)}
    assert leading_sharding("sample", None, data).spec == PartitionSpec("b")
    assert leading_sharding("sample", None, {"x": data["x"], "z": jax.numpy.ones(2)}) is None
    assert on_axis(one, 2).spec == PartitionSpec(None, None, "b")
    assert everywhere(one).spec == PartitionSpec()
    across = NamedSharding(mesh, PartitionSpec(None, "a"))
    with pytest.raises(ebm.ModelError, match="sample"):
        leading_sharding("sample", across)
    assert placed({"k": jax.random.key(1)}, everywhere(one))["k"].shape == ()


@pytest.mark.slow
def test_eight_devices_and_two_processes_give_what_one_gives():
    one, eight = told(started(1)), told(started(8))
    assert_close(eight, one, ["DSM", "PCD", "VaGES", "own", "stream", "all rows"])
    np.testing.assert_allclose(*eight["update"], rtol=2e-5)
    assert ["explicit axes" in x for x in eight["refused"]] == [True] * 4
    assert eight["PCD"]["chains"] == eight["draws"]["share"] == 1 / 8
    np.testing.assert_allclose(
        eight["draws"]["values"], one["draws"]["values"], rtol=1e-4, atol=1e-5
    )
    (value, mcse), (expected, _) = eight["log Z"], one["log Z"]
    assert abs(value - expected) < 4 * mcse  # an acceptance may round the other way
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    for found in map(told, [started(2, process, port) for process in (0, 1)]):
        assert_close(found, one, ["DSM", "PCD", "own", "stream"])
        assert found["PCD"]["chains"] == 1 / 4


def test_shardings_that_cannot_be():
    def model(data):
        mean = numpyro.param("mean", 0.0)
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            ebm.energy("E", 0.5 * (v - mean) ** 2)

    mesh = Mesh(np.array(jax.devices()[:1]), ("rows",))
    svi = ebm.EnergySVI(model, None, optax.adam(0.1), ebm.ScoreMatching())
    for wrong in (NamedSharding(mesh, PartitionSpec()), "rows", 8):
        with pytest.raises(ebm.ModelError, match="`sharding` is"):
            svi.run(jax.random.key(1), 3, np.ones(4), sharding=wrong, progress_bar=False)
    fit = svi.run(jax.random.key(1), 3, np.arange(4.0), sharding=mesh, progress_bar=False)
    plain = svi.run(jax.random.key(1), 3, np.arange(4.0), progress_bar=False)
    np.testing.assert_array_equal(fit.losses, plain.losses)
    explicit = jax.make_mesh(
        (1,), ("rows",)
    )  # of a kind that asks for the sharding of every result
    rows = jax.device_put(np.arange(4.0), NamedSharding(explicit, PartitionSpec("rows")))
    for data, options in ((np.arange(4.0), {"sharding": explicit}), (rows, {})):
        fit = svi.run(jax.random.key(1), 3, data, batch_size=2, progress_bar=False, **options)
        plain = svi.run(jax.random.key(1), 3, np.arange(4.0), batch_size=2, progress_bar=False)
        np.testing.assert_array_equal(fit.losses, plain.losses)
    eight = jax.sharding.AbstractMesh((4, 2), ("a", "b"))
    for spec, parts in ((PartitionSpec("a"), 4), (PartitionSpec(("a", "b")), 8)):
        check_divides("sample", NamedSharding(eight, spec), chains=16)
        with pytest.raises(ebm.ModelError, match=f"18 chains .* multiple of {parts}"):
            check_divides("sample", NamedSharding(eight, spec), chains=18)


@pytest.mark.slow
def test_collectives_of_a_round_on_eight_devices():
    """A device has an eighth of rows and chains, and of the work; gradients are what is sent."""
    script = Path(__file__).parents[2] / "benchmarks" / "devices.py"
    sizes = 512, 16, 8, 64
    _, num_visible, num_hidden, batch = sizes
    command = [sys.executable, str(script), "--devices", "1", "8", "--json", "--sizes"]
    told = subprocess.run([*command, *map(str, sizes)], check=True, capture_output=True, text=True)
    found = json.loads(told.stdout)
    num_parameters = num_visible * num_hidden + num_visible
    for of_number in found.values():
        one, eight = of_number["1"], of_number["8"]
        np.testing.assert_allclose(eight["losses"], one["losses"], rtol=2e-5, atol=2e-5)
        assert not one["run"] and not one["update"]
        assert eight["share"] == 1 / 8 and eight["flops"] < one["flops"] / 4
        sent = sum(size for _, size in eight["update"])
        assert 4 * num_parameters <= sent < 4 * (8 * num_parameters + 4 * batch * num_visible)
    assert [name for name, _ in found["DSM"]["8"]["update"]] == ["all-reduce"]
