# SPDX-License-Identifier: Apache-2.0
"""Sites side by side as coordinates, and back."""

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_ebm.samplers.positions import flatten_sites, unflatten_sites


def test_sites_stand_in_the_order_of_their_names_and_come_back():
    position = {"b": jnp.arange(12.0).reshape(3, 2, 2), "a": jnp.arange(3), "other": jnp.ones(3)}
    flat, unflatten = flatten_sites(position, ("b", "a"))
    np.testing.assert_array_equal(flat, [[*range(4 * i, 4 * i + 4), i] for i in range(3)])
    found = unflatten(flat)
    assert list(found) == ["b", "a"]
    for name, x in found.items():
        np.testing.assert_array_equal(x, position[name])


def test_any_number_of_rows_comes_back_from_shapes_alone():
    like = {"x": jax.ShapeDtypeStruct((3, 2), int), "y": jax.ShapeDtypeStruct((3,), int)}
    found = unflatten_sites(jnp.arange(15.0).reshape(5, 3), like, ("x", "y"))
    np.testing.assert_array_equal(found["x"], np.arange(15.0).reshape(5, 3)[:, :2])
    np.testing.assert_array_equal(found["y"], np.arange(15.0).reshape(5, 3)[:, 2])


def test_one_site_alone_is_not_sliced():
    # An analysis of the program would have to know it for the site itself.
    like = {"x": jnp.ones((3, 2))}
    jaxpr = jax.make_jaxpr(lambda flat: unflatten_sites(flat, like, ("x",))["x"])(like["x"])
    assert not jaxpr.eqns
