# SPDX-License-Identifier: Apache-2.0
"""Values and joint states of discrete sites, against products written out."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from oracles.values import Values

import numpyro_ebm as ebm
from numpyro_ebm.model.finite_supports import (
    check_values,
    grid,
    in_all_rows,
    is_binary,
    joint_states,
    num_joint_states,
    shifted,
    support_values,
)
from numpyro_ebm.model.reading import read_model
from numpyro_ebm.model.row_site import RowSite, placeholder


class OneHot(dist.Distribution):
    support = dist.constraints.independent(dist.constraints.boolean, 1)
    has_enumerate_support = True

    def enumerate_support(self, expand=True):
        return jnp.eye(2)


def site(fn):
    return RowSite("h", fn, jnp.zeros(fn.shape()), ())


def model(data):
    with numpyro.plate("data", len(data), dim=-2):
        v = numpyro.sample("v", ebm.Lebesgue().expand((len(data), 1)), obs=data)
        spin = numpyro.sample("spin", ebm.Counting(event_shape=(2,)))
        with numpyro.plate("units", 2):
            level = numpyro.sample("level", dist.DiscreteUniform(3, 5))
            unit = numpyro.sample("unit", ebm.Counting(4))
        rest = (spin.sum(-1) + (level * unit).sum(-1, keepdims=True)) * v
        ebm.energy("E", rest)


@pytest.mark.parametrize(
    "fn, values",
    [
        (ebm.Counting(3, event_shape=(2,)), [0, 1, 2]),
        (dist.Bernoulli(0.5).expand((4,)).to_event(1), [0, 1]),
        (dist.DiscreteUniform(3, 5).mask(False), [3, 4, 5]),
        (dist.Binomial(2, 0.5).expand((3, 2)), [0, 1, 2]),
        (dist.Categorical(jnp.ones(1)), [0]),
        (Values(1, -1), [-1, 1]),
        (Values(0, 2, 5), [0, 2, 5]),
    ],
)
def test_values_of_a_coordinate(fn, values):
    assert jax.jit(lambda: jnp.asarray(support_values(site(fn), "test")))().tolist() == values
    assert is_binary(site(fn)) == (values == [0, 1])


@pytest.mark.parametrize(
    "fn, message",
    [
        (dist.Poisson(1.0), r"test: the site 'h' \(Poisson\) has infinitely many values"),
        (OneHot(event_shape=(2,)), "are arrays, not numbers"),
        (Values(0, 1, 1), r"are \[0, 1, 1\]: one of them is there twice"),
        (dist.Binomial(jnp.array([1, 2]), 0.5), "must be the same for all its elements"),
    ],
)
def test_sites_without_values_of_a_coordinate(fn, message):
    with pytest.raises(ebm.ModelError, match=message):
        support_values(site(fn), "test")
    assert not is_binary(site(fn))


@pytest.mark.parametrize("values", [(0, 1, 2), (-1, 1), (3, 4, 7), (-0.5, 0.5), (2,)])
@pytest.mark.parametrize("dtype", [int, float])
def test_values_are_shifted_among_their_support(values, dtype):
    if dtype is int and values[0] != int(values[0]):
        return
    support = np.array(values)
    for shift in range(len(values)):
        moved = shifted(jnp.asarray(support, dtype), jnp.array(shift), support)
        assert moved.tolist() == np.roll(support, -shift).tolist()
        assert moved.dtype == jnp.asarray(support, dtype).dtype


def test_what_stands_for_a_value_is_on_the_support():
    laws = dist.DiscreteUniform(3, 5), ebm.Counting(3, (2,)), dist.Poisson(2.0), dist.Gamma(2.0)
    for fn in laws:
        assert np.all(fn.support(placeholder({"type": "sample", "value": None, "fn": fn})))


def test_data_between_the_values_are_refused():
    spins = RowSite("s", Values(-1, 1), jnp.array([-1, 0, 1]), ())
    with pytest.raises(ebm.ModelError, match=r"test: the data .*'s'.*\[-1, 1\], in 1 of 3"):
        check_values(spins, "test")
    assert check_values(spins._replace(value=jnp.array([1, -1])), "test").tolist() == [-1, 1]


def test_joint_states_of_a_row():
    row_model = read_model(model, (jnp.ones((3, 1)),))
    states = joint_states(row_model, ("spin", "level"), "test")
    assert {name: x.shape[1:] for name, x in states.items()} == {"spin": (1, 2), "level": (2,)}
    written_out = list(itertools.product([0, 1], [0, 1], [3, 4, 5], [3, 4, 5]))
    flat = np.concatenate([states["spin"].reshape(-1, 2), states["level"]], 1)
    np.testing.assert_array_equal(flat, written_out)
    assert num_joint_states(row_model, ("spin", "level"), "test") == len(written_out)
    assert num_joint_states(row_model, row_model.latent, "test") == 36 * 16
    placed = in_all_rows(row_model, {name: x[7] for name, x in states.items()})
    for name, x in placed.items():
        assert x.shape == row_model.latent[name].value.shape
    assert placed["level"].tolist() == [list(written_out[7][2:])] * 3
    assert joint_states(row_model, (), "test") == {}


def test_more_states_than_a_number_can_say():
    def many(data):
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            h = numpyro.sample("h", ebm.Counting(event_shape=(20_000,)))
            ebm.energy("E", v * h.sum(-1) ** 2)

    row_model = read_model(many, (jnp.ones(2),))
    assert num_joint_states(row_model, ("h",), "test") == float("inf")
    with pytest.raises(ebm.ModelError, match="inf joint states per row"):
        ebm.Enumerated().check(row_model, None, 1)


def test_grid():
    columns = [np.array(x) for x in ([0, 1], [5.0, 6.0, 7.0], [2])]
    np.testing.assert_array_equal(grid(columns), list(itertools.product(*columns)))
    np.testing.assert_array_equal(grid(columns, jnp), grid(columns))
    assert grid([]).shape == (1, 0)
