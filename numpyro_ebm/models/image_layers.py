# SPDX-License-Identifier: Apache-2.0
"""Layers of the networks on images, as equinox modules; imported where a network is made."""

import math
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp

__all__ = ["ImageNetwork", "PatchConvolution", "ResidualBlock"]


class PatchConvolution(eqx.Module):
    r"""A convolution as the product of its weights with the patches of an image.

    .. math:: y_{o, i, j} = b_o + \sum_{a, b, c} W_{o, a, b, c}\, x_{c, s i + a, s j + b}

    The image is padded by half of a patch. XLA on CPU runs products of matrices as fast within a
    loop as outside of one, and its own convolutions ten times slower.
    """

    weight: jax.Array  # (out_channels, size * size * in_channels), offsets before channels
    bias: jax.Array
    size: int = eqx.field(static=True)
    stride: int = eqx.field(static=True)
    padding: Literal["zeros", "circular"] = eqx.field(static=True)

    def __init__(
        self,
        rng_key: jax.Array,
        in_channels: int,
        out_channels: int,
        size: int = 3,
        stride: int = 1,
        padding: Literal["zeros", "circular"] = "zeros",
    ):
        fan_in = in_channels * size**2
        bound = math.sqrt(3 / fan_in)
        self.weight = jax.random.uniform(rng_key, (out_channels, fan_in), float, -bound, bound)
        self.bias = jnp.zeros(out_channels)
        self.size, self.stride, self.padding = size, stride, padding

    def __call__(self, x: jax.Array) -> jax.Array:
        _, height, width = x.shape
        before, after = (self.size - 1) // 2, self.size // 2
        margin = (0, 0), (before, after), (before, after)
        x = jnp.pad(x, margin, "wrap" if self.padding == "circular" else "constant")
        patches = [
            x[:, i : i + height : self.stride, j : j + width : self.stride]
            for i in range(self.size)
            for j in range(self.size)
        ]
        return jnp.tensordot(self.weight, jnp.concatenate(patches), 1) + self.bias[:, None, None]


class ResidualBlock(eqx.Module):
    r"""Two convolutions beside the identity, :math:`x + f_2(a(f_1(a(x))))`, without normalisation.

    :math:`f_2` starts at zero, so that a deep network starts as a shallow one.
    """

    first: PatchConvolution
    second: PatchConvolution
    activation: Any = eqx.field(static=True)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.second(self.activation(self.first(self.activation(x))))


class ImageNetwork(eqx.Module):
    """Layers one after the other on an image of a given shape, and a linear read-out.

    Its input may be flat; it is brought into (channels, height, width).
    """

    layers: tuple
    readout: Any
    shape: tuple[int, ...] = eqx.field(static=True)
    pooled: bool = eqx.field(static=True)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = jnp.reshape(x, self.shape)
        for layer in self.layers:
            x = layer(x)
        return self.readout(jnp.sum(x, (-2, -1)) if self.pooled else jnp.ravel(x))
