# SPDX-License-Identifier: Apache-2.0
r"""Networks on images as energies or features: perceptrons, convolutions, residual blocks.

A network maps one image to a number, an energy, or to a vector: logits of classes, features, the
parameters of a guide. They are smooth (``silu``) and have neither batch statistics nor noise, so
that scores exist and no row reads another. All are equinox modules: change them with
``equinox.tree_at``, or write your own; the models here take any.

Reference: Nijkamp, Hill, Zhu, Wu, *Learning non-convergent non-persistent short-run MCMC toward
energy-based model*, NeurIPS 2019 (plain convolutions); Du, Mordatch, *Implicit generation and
modeling with energy-based models*, NeurIPS 2019 (residual blocks without normalisation).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from numpyro_ebm.errors import ModelError, check_integer
from numpyro_ebm.signatures import checked

__all__ = ["conv_network", "equinox_extra", "mlp_network", "residual_network", "row_shape"]


def equinox_extra(owner: str) -> Any:
    """The module ``equinox``.

    :param str owner: who needs it, for the message.
    :raises ImportError: if it is missing, with the extra that brings it.
    """
    try:
        import equinox
    except ImportError as error:
        raise ImportError(
            f"{owner} makes networks of equinox, which is missing: "
            'pip install "numpyro-ebm[networks]".'
        ) from error
    return equinox


@checked
def mlp_network(
    rng_key: jax.Array,
    shape: int | Sequence[int],
    *,
    num_outputs: int | None = None,
    widths: Sequence[int] = (128, 128),
    activation: Callable = jax.nn.silu,
) -> Any:
    r"""A multilayer perceptron on the entries of a row.

    .. math:: f(v) = W_L\, a(W_{L-1} \cdots a(W_1 v + b_1) \cdots) + b_L

    :param rng_key: random key of the initial weights.
    :param shape: event shape of a row, of any rank.
    :param num_outputs: length of the output, or ``None`` for a number.
    :param widths: of the hidden layers.
    :param activation: a; smooth, where scores are trained.
    :return: an ``equinox`` module.
    :raises ModelError: if a size is no positive integer.
    :raises ImportError: without the extra ``networks``.

    **Example**

    >>> import jax, jax.numpy as jnp
    >>> import numpyro_ebm as ebm
    >>> ebm.models.mlp_network(jax.random.key(0), (8, 8))(jnp.zeros((8, 8))).shape
    ()
    """
    eqx = equinox_extra("mlp_network")
    shape = _checked_shape("mlp_network", shape, num_outputs, widths=widths)
    keys = jax.random.split(rng_key, len(widths) + 1)
    sizes = [math.prod(shape), *widths]
    layers: list[Any] = [eqx.nn.Lambda(jax.numpy.ravel)]
    for rng_key, fan_in, fan_out in zip(keys, sizes, widths, strict=False):
        layers += [eqx.nn.Linear(fan_in, fan_out, key=rng_key), eqx.nn.Lambda(activation)]
    readout = eqx.nn.Linear(sizes[-1], num_outputs or "scalar", key=keys[-1])
    return eqx.nn.Sequential([*layers, readout])


@checked
def conv_network(
    rng_key: jax.Array,
    shape: Sequence[int],
    *,
    num_outputs: int | None = None,
    channels: Sequence[int] = (32, 64, 64),
    kernel_size: int = 3,
    padding: Literal["zeros", "circular"] = "zeros",
    pooled: bool = False,
    activation: Callable = jax.nn.silu,
) -> Any:
    r"""Convolutions on images; every one after the first halves their sides.

    .. math:: f(v) = w^\top \operatorname{vec}\, a(K_L * \cdots a(K_1 * v + b_1) \cdots) + b

    :param rng_key: random key of the initial weights.
    :param shape: (height, width), or (channels, height, width); rows of the model may be flat.
    :param num_outputs: length of the output, or ``None`` for a number.
    :param channels: of the convolutions.
    :param int kernel_size: side of their kernels.
    :param str padding: with ``"zeros"`` a network knows the margins of an image, with
        ``"circular"`` an image has none.
    :param bool pooled: whether the last layer is summed over the image, and no convolution halves
        it then. With circular padding the network does not change where the image is moved around.
    :param activation: a; smooth, where scores are trained.
    :return: an ``equinox`` module.
    :raises ModelError: if a size is no positive integer, or the shape is no image's.
    :raises ImportError: without the extra ``networks``.

    **Example**

    >>> import jax, jax.numpy as jnp
    >>> import numpyro_ebm as ebm
    >>> network = ebm.models.conv_network(jax.random.key(0), (8, 8), num_outputs=10)
    >>> network(jnp.zeros(64)).shape
    (10,)
    """
    eqx = equinox_extra("conv_network")
    from numpyro_ebm.models.image_layers import ImageNetwork, PatchConvolution

    check_integer("conv_network", kernel_size=kernel_size)
    image = _checked_image("conv_network", shape, num_outputs, channels, padding)
    keys = jax.random.split(rng_key, len(channels) + 1)
    sizes = [image[0], *channels]
    layers = []
    for i, key in enumerate(keys[:-1]):
        stride = 1 if i == 0 or pooled else 2
        layer = PatchConvolution(key, sizes[i], sizes[i + 1], kernel_size, stride, padding)
        layers += [layer, eqx.nn.Lambda(activation)]
    return _read_out(eqx, keys[-1], ImageNetwork, layers, image, num_outputs, pooled)


@checked
def residual_network(
    rng_key: jax.Array,
    shape: Sequence[int],
    *,
    num_outputs: int | None = None,
    channels: Sequence[int] = (32, 64, 64),
    num_blocks: int = 1,
    padding: Literal["zeros", "circular"] = "zeros",
    pooled: bool = False,
    activation: Callable = jax.nn.silu,
) -> Any:
    r"""Residual blocks on images, without normalisation.

    .. math:: x \leftarrow x + K_2 * a(K_1 * a(x))

    after every convolution of :func:`conv_network`, whose other arguments it has.

    :param rng_key: random key of the initial weights.
    :param shape: (height, width), or (channels, height, width); rows of the model may be flat.
    :param num_outputs: length of the output, or ``None`` for a number.
    :param channels: of the stages; each after the first halves the sides of the image.
    :param int num_blocks: residual blocks in each stage.
    :param str padding: as in :func:`conv_network`.
    :param bool pooled: as in :func:`conv_network`.
    :param activation: a; smooth, where scores are trained.
    :return: an ``equinox`` module.
    :raises ModelError: if a size is no positive integer, or the shape is no image's.
    :raises ImportError: without the extra ``networks``.

    **Example**

    >>> import jax, jax.numpy as jnp
    >>> import numpyro_ebm as ebm
    >>> network = ebm.models.residual_network(jax.random.key(0), (3, 8, 8), channels=(8, 8))
    >>> network(jnp.zeros((3, 8, 8))).shape
    ()
    """
    eqx = equinox_extra("residual_network")
    from numpyro_ebm.models.image_layers import ImageNetwork, PatchConvolution, ResidualBlock

    check_integer("residual_network", num_blocks=num_blocks)
    image = _checked_image("residual_network", shape, num_outputs, channels, padding)
    key_readout, *keys = jax.random.split(rng_key, len(channels) + 1)
    sizes, layers = [image[0], *channels], []
    for i, rng_key in enumerate(keys):
        stride = 1 if i == 0 or pooled else 2
        key, *pairs = jax.random.split(rng_key, 1 + num_blocks)
        layers.append(PatchConvolution(key, sizes[i], sizes[i + 1], 3, stride, padding))
        for pair in pairs:
            first = PatchConvolution(pair, sizes[i + 1], sizes[i + 1], 3, 1, padding)
            second = eqx.tree_at(lambda x: x.weight, first, 0.0 * first.weight)
            layers.append(ResidualBlock(first, second, activation))
    layers.append(eqx.nn.Lambda(activation))
    return _read_out(eqx, key_readout, ImageNetwork, layers, image, num_outputs, pooled)


def _read_out(eqx, rng_key, network, layers, image, num_outputs, pooled):
    """The network of these layers, with a linear map of the last one at its end."""

    def features(x):
        for layer in layers:
            x = layer(x)
        return x

    found = jax.eval_shape(features, jax.ShapeDtypeStruct(image, jnp.result_type(float)))
    fan_in = found.shape[0] if pooled else math.prod(found.shape)
    readout = eqx.nn.Linear(fan_in, num_outputs or "scalar", key=rng_key)
    return network(tuple(layers), readout, image, pooled)


def row_shape(owner: str, shape: Any, **sizes: Any) -> tuple[int, ...]:
    """The event shape of a row, which may be given as its length.

    :param str owner: who takes it, for the message.
    :param shape: a positive integer, or a sequence of them.
    :param sizes: further sequences of positive integers, by name.
    :raises ModelError: if one of them is anything else.
    """
    shape = (shape,) if isinstance(shape, int) else shape
    for name, given in {"shape": shape, **sizes}.items():
        if not isinstance(given, Sequence) or isinstance(given, str):
            raise ModelError(
                f"{owner}: `{name}` must be a tuple of positive integers, such as (32, 64), got "
                f"{given!r}."
            )
        for size in given:
            check_integer(f"{owner}, in `{name}`", size=size)
    return tuple(shape)


def _checked_shape(owner, shape, num_outputs, **sizes):
    if num_outputs is not None:
        check_integer(owner, num_outputs=num_outputs)
    return row_shape(owner, shape, **sizes)


def _checked_image(owner, shape, num_outputs, channels, padding):
    """The shape of an image, with its channels."""
    shape = _checked_shape(owner, shape, num_outputs, channels=channels)
    if len(shape) == 3 and shape[0] == shape[1] > 4 >= shape[2]:
        raise ModelError(
            f"{owner}: `shape` {shape} has its channels last, and they come first: "
            f"{(shape[2], *shape[:2])}. Transpose the rows, `jnp.moveaxis(data, -1, 1)`."
        )
    if len(shape) not in (2, 3):
        raise ModelError(
            f"{owner}: `shape` must be (height, width) or (channels, height, width), got {shape}."
        )
    if padding not in ("zeros", "circular"):
        raise ModelError(f"{owner}: `padding` must be 'zeros' or 'circular', got {padding!r}.")
    return (1, *shape) if len(shape) == 2 else shape
