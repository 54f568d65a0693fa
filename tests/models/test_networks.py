# SPDX-License-Identifier: Apache-2.0
"""Networks on images: convolutions against sums in NumPy, and what does not change a network."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import numpyro_ebm as ebm
from numpyro_ebm.models import conv_network, mlp_network, residual_network

eqx = pytest.importorskip("equinox")
KEY = jax.random.key(3)


def convolved(weight, bias, x, size, stride, padding):
    """The convolution as its definition has it, one product at a time."""
    margin = ((0, 0), ((size - 1) // 2, size // 2), ((size - 1) // 2, size // 2))
    x = np.pad(x, margin, mode="wrap" if padding == "circular" else "constant")
    channels, height, width = x.shape
    w = weight.reshape(len(weight), size, size, channels)
    rows, columns = range(0, height - size + 1, stride), range(0, width - size + 1, stride)
    out = np.zeros((len(w), len(rows), len(columns)))
    for k, i in enumerate(rows):
        for m, j in enumerate(columns):
            patch = np.moveaxis(x[:, i : i + size, j : j + size], 0, -1)
            out[:, k, m] = (w * patch).sum((1, 2, 3)) + bias
    return out


@pytest.mark.parametrize(("size", "stride"), [(3, 1), (3, 2), (2, 2), (5, 1), (1, 1)])
@pytest.mark.parametrize("padding", ["zeros", "circular"])
def test_patches_times_weights_are_a_convolution(size, stride, padding):
    from numpyro_ebm.models.image_layers import PatchConvolution

    rng = np.random.default_rng(0)
    layer = PatchConvolution(KEY, 2, 4, size, stride, padding)
    bias, x = rng.normal(size=4), rng.normal(size=(2, 5, 6))
    object.__setattr__(layer, "bias", jnp.asarray(bias))
    expected = convolved(np.asarray(layer.weight), bias, x, size, stride, padding)
    np.testing.assert_allclose(layer(jnp.asarray(x, jnp.float32)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [conv_network, residual_network])
def test_pooled_networks_on_a_torus_do_not_see_where_an_image_is(make):
    image = jax.random.normal(KEY, (2, 6, 6))
    moved = jnp.roll(image, (2, -1), (1, 2))
    options = {"channels": (3, 4), "pooled": True}
    free = make(KEY, (2, 6, 6), padding="circular", **options)
    np.testing.assert_allclose(free(image), free(moved), rtol=1e-5)
    bounded = make(KEY, (2, 6, 6), padding="zeros", **options)
    assert abs(bounded(image) - bounded(moved)) > 1e-3


def test_residual_blocks_start_as_the_identity():
    from numpyro_ebm.models.image_layers import ResidualBlock

    network = residual_network(KEY, (6, 6), channels=(3, 4), num_blocks=2)
    blocks = [layer for layer in network.layers if isinstance(layer, ResidualBlock)]
    assert len(blocks) == 4
    x = jax.random.normal(KEY, (4, 3, 3))
    np.testing.assert_array_equal(blocks[-1](x), x)


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("make", [conv_network, residual_network])
def test_networks_are_their_layers_written_out(make, pooled):
    """Of weights that are nowhere zero: both convolutions of a block, and a at its end."""
    free = make(KEY, (2, 5, 4), channels=(3, 4), num_outputs=2, pooled=pooled)
    leaves, tree = jax.tree.flatten(free)
    rng = np.random.default_rng(0)
    network = jax.tree.unflatten(
        tree, [rng.normal(size=x.shape) / 4 if eqx.is_array(x) else x for x in leaves]
    )
    image = rng.normal(size=(2, 5, 4))

    def apply(layer, x):
        return convolved(layer.weight, layer.bias, x, layer.size, layer.stride, layer.padding)

    def smooth(x):
        return x / (1 + np.exp(-x))

    x, kernels = image, [layer for layer in network.layers if hasattr(layer, "weight")]
    blocks = [layer for layer in network.layers if hasattr(layer, "first")]
    for i, layer in enumerate(kernels):
        assert layer.stride == (1 if i == 0 or pooled else 2)
        x = apply(layer, x)
        if blocks:
            x = x + apply(blocks[i].second, smooth(apply(blocks[i].first, smooth(x))))
        else:
            x = smooth(x)
    x = smooth(x) if blocks else x
    readout = network.readout
    expected = readout.weight @ (x.sum((1, 2)) if pooled else x.ravel()) + readout.bias
    found = network(jnp.asarray(image, jnp.float32))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_a_perceptron_is_its_layers_written_out():
    network = mlp_network(KEY, (2, 3), widths=(5, 4), activation=jnp.tanh)
    x = np.random.default_rng(0).normal(size=(2, 3))
    *hidden, last = [layer for layer in network.layers if isinstance(layer, eqx.nn.Linear)]
    assert [layer.weight.shape for layer in hidden] == [(5, 6), (4, 5)]
    h = x.ravel()
    for layer in hidden:
        h = np.tanh(layer.weight @ h + layer.bias)
    expected = (last.weight @ h + last.bias)[0]
    np.testing.assert_allclose(network(jnp.asarray(x, jnp.float32)), expected, rtol=1e-4)


@pytest.mark.parametrize(
    "make, options",
    [
        (mlp_network, {"widths": (8, 30, 30)}),
        (conv_network, {"channels": (4, 4, 4)}),
        (residual_network, {"channels": (4, 4, 4), "num_blocks": 2}),
    ],
)
def test_layers_have_weights_of_their_own(make, options):
    """No two begin alike, nor with the same numbers at another scale."""
    leaves = jax.tree.leaves(eqx.filter(make(KEY, (4, 8, 8), **options), eqx.is_array))
    weights = [np.ravel(x) for x in leaves if x.ndim > 1 and np.any(x)]
    assert len(weights) >= 4
    for i, one in enumerate(weights):
        for other in weights[:i]:
            num = min(one.size, other.size)
            assert abs(np.corrcoef(one[:num], other[:num])[0, 1]) < 4.5 / np.sqrt(num)


@pytest.mark.parametrize("make", [mlp_network, conv_network, residual_network])
def test_outputs_and_flat_rows(make):
    x = jax.random.normal(KEY, (5, 7))  # sides that cannot be halved
    assert make(KEY, (5, 7))(x).shape == ()
    logits = make(KEY, (5, 7), num_outputs=3)
    assert logits(x).shape == (3,)
    np.testing.assert_array_equal(logits(x), logits(x.ravel()))


def test_networks_that_cannot_be_made():
    for make, arguments, words in (
        (conv_network, ((8,),), "height, width"),
        (residual_network, ((8, 8, 8, 8),), "height, width"),
        (conv_network, ((8, 0),), "positive integer"),
    ):
        with pytest.raises(ebm.ModelError, match=words):
            make(KEY, *arguments)
    for options in ({"num_outputs": 2.5}, {"padding": "same"}, {"channels": (4, -1)}):
        with pytest.raises(ebm.ModelError, match="conv_network"):
            conv_network(KEY, (8, 8), **options)


def test_without_equinox_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "equinox", None)
    for make in (mlp_network, conv_network, residual_network):
        with pytest.raises(ImportError, match=rf"{make.__name__}.*numpyro-ebm\[networks\]"):
            make(KEY, (4, 4))
    with pytest.raises(ImportError, match="neural_energy"):
        ebm.models.neural_energy(None, 2)()
