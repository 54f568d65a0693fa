# SPDX-License-Identifier: Apache-2.0
"""Arguments, plates and groups of rows, and values that NumPyro enumerates, by plain NumPy."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import numpyro_ebm as ebm
from numpyro_ebm.model.arguments import Arguments
from numpyro_ebm.model.data_plate import DataPlate
from numpyro_ebm.model.enumerated_values import EnumeratedValues
from numpyro_ebm.model.row_groups import in_groups, num_groups

X, Y, SCALAR = jnp.arange(5.0), jnp.arange(6.0).reshape(2, 3), jnp.zeros(())


def arguments(x=X, number=3, key="y", scalar=SCALAR):
    return Arguments((x, number, [scalar]), {key: Y})


@pytest.mark.parametrize(
    "other, are, like, form",
    [
        (arguments(), True, True, True),
        (arguments(X + 1.0), False, True, True),
        (arguments(X[:4]), False, False, True),
        (arguments(X.astype(int)), False, False, True),
        (arguments(scalar=jnp.zeros(())), False, False, False),  # what it is may make another model
        (arguments(number=4), False, False, False),
        (arguments(key="z"), False, False, False),
        (arguments(x=1.0), False, False, False),
    ],
)
def test_arguments_that_make_the_same_model(other, are, like, form):
    one = arguments()
    assert (one.are(other), one.are_like(other), one.have_form_of(other)) == (are, like, form)


def test_arrays_of_arguments_are_exchanged_by_their_places():
    one = arguments()
    assert {k: one.names[k] for k in one.arrays} == {
        "arg:0": "argument number 1",
        "arg:3": "argument 'y'",
    }
    other = one.with_arrays({"arg:3": 2 * Y})
    assert other.args == one.args and np.array_equal(other.kwargs["y"], 2 * Y)


def frames(*names):
    return [SimpleNamespace(name=name) for name in names]


def test_numbers_of_rows_in_a_plate_that_is_not_the_last():
    """Three rows of six, before a plate of four units of ten."""
    plate = DataPlate("data", -2, 3, 6, {"units": 2.5}, {})
    x = np.random.default_rng(0).normal(size=(2, 3, 4))
    np.testing.assert_allclose(plate.sum_to_rows(jnp.asarray(x)), x.sum((0, 2)), rtol=1e-5)
    np.testing.assert_array_equal(plate.by_row("v", jnp.arange(3.0)[:, None]), [0, 1, 2])
    np.testing.assert_array_equal(plate.by_row("v", jnp.array(2.0)), [2, 2, 2])
    for wrong in (jnp.arange(4.0), jnp.arange(2.0)[:, None]):
        with pytest.raises(ebm.ModelError):
            plate.by_row("v", wrong)
    site = {"scale": 15.0, "cond_indep_stack": frames("data", "units")}
    assert plate.user_scale(site) == 3.0
    assert plate.user_scale({**site, "scale": 5.0}) is None
    assert plate.user_scale({"scale": 6.0, "cond_indep_stack": frames("data")}) == 3.0


def test_points_go_through_the_rows_in_groups():
    """Seven by three; the groups have keys of their own, and what fills up the last is left out."""
    points, keys = {"x": jnp.arange(7.0)}, jax.random.split(jax.random.key(4), 3)
    assert [num_groups(n, 3) for n in (1, 3, 4, 7)] == [1, 1, 2, 3]

    def double(points, key=None):
        assert points["x"].shape == (3,)
        noise = 0.0 if key is None else jax.random.normal(key)
        return {"a": 2 * points["x"], "b": jnp.stack([points["x"], noise + jnp.zeros(3)], -1)}

    for found in (in_groups(double, 3, points), in_groups(double, 3, points, keys=keys)):
        np.testing.assert_array_equal(found["a"], 2 * np.arange(7))
        np.testing.assert_array_equal(found["b"][:, 0], np.arange(7))
    expected = np.repeat([float(jax.random.normal(key)) for key in keys], 3)[:7]
    np.testing.assert_allclose(found["b"][:, 1], expected, rtol=1e-6)


def test_enumerated_values_keep_their_places():
    """Two sites of three and of two values lead, left of two plates."""
    values = {"a": jnp.arange(6.0)[:, None] + jnp.zeros(2), "b": jnp.array(10.0)}
    one = EnumeratedValues(values, {"a"}, (3, 2), 2)
    assert one.one["a"].shape == (2,) and one.one["b"] == 10.0
    total = one.map(lambda x: jnp.sum(x["a"]) + x["b"] * jnp.arange(5.0))
    table = (2 * np.arange(6.0)[:, None] + 10 * np.arange(5.0)).reshape(3, 2, 5)
    np.testing.assert_array_equal(one.place(total, -1), table[:, :, None])
    np.testing.assert_array_equal(one.place(total, -2), table[..., None])
    np.testing.assert_array_equal(one.place(total[:, 1]), table[..., 1, None, None])
    none = EnumeratedValues({"b": values["b"]}, set(), (), 2)
    np.testing.assert_array_equal(none.place(total[0], -2), table[0, 0][:, None])
    assert none.place(total[0, 1]).shape == ()
