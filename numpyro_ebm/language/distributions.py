# SPDX-License-Identifier: Apache-2.0
"""Base measures of energy-based models, and the site distribution of an energy statement.

A density p(v, h) ∝ exp(-E(v, h)) is a density *with respect to* something. :class:`Lebesgue` and
:class:`Counting` are that something: their log-density is zero everywhere on the support. A proper
NumPyro distribution serves as well, and is then tilted by the energy.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import lax
from jax.typing import ArrayLike
from numpyro.distributions import constraints

from numpyro_ebm._compat import is_enumerating, not_jax_tracer
from numpyro_ebm.errors import (
    ImproperSamplingError,
    ModelError,
    UnhandledEnergyError,
    check_integer,
)
from numpyro_ebm.language.questions import who_resolves
from numpyro_ebm.signatures import checked

__all__ = ["Counting", "Lebesgue", "Unnormalized"]


def _shape(event_shape, owner):
    event_shape = tuple(event_shape)
    if not all(isinstance(size, int) and size > 0 for size in event_shape):
        raise ModelError(
            f"{owner}: `event_shape` must be a tuple of positive integers, got {event_shape}."
        )
    return event_shape


def scalar_support(support: Any) -> Any:
    """The support of one number of an array, without event dimensions."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support


def is_real(support: Any) -> bool:
    """Whether a support is all real numbers, vectors or arrays."""
    return scalar_support(support) is constraints.real


def lowest_value(support: Any) -> int:
    """The smallest value of a discrete support."""
    return int(getattr(scalar_support(support), "lower_bound", 0))


def speak_for(fn: Any) -> None:
    """Let an energy answer for the base measure of a site, which is then silent itself."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    if isinstance(fn, Lebesgue | Counting) and fn.handled_by is None:
        fn.handled_by = "energy"


def check_resolved(base: Any, proper: str) -> None:
    """Raise if the density of a flat base measure is asked where no energy shapes its site."""
    if base.handled_by is None:
        raise UnhandledEnergyError(
            f"The density of a site with the base measure {type(base).__name__}(event_shape="
            f"{base.event_shape}) is asked, and the model states no energy for it. A "
            "`numpyro.factor` in its place would forget log Z of the parameters. State "
            "`numpyro_ebm.energy(name, value)` in its plate and resolve it (`fixed`, `normalized`, "
            f"`generalized`, an objective); where a flat prior is meant, write `{proper}`."
        )


class Lebesgue(dist.ImproperUniform):
    r"""Lebesgue measure: the flat base measure of a continuous site.

    .. math:: \log b(v) = 0 \quad \text{for } v \in \text{support}, \qquad -∞ \text{ elsewhere}

    :param tuple event_shape: shape of one element of the site.
    :param support: a NumPyro constraint; ``constraints.real`` unless given.
    :raises ModelError: if the support is discrete, or has more event dimensions than
        ``event_shape``.
    :raises ImproperSamplingError: when sampled. Draws of an energy-based model come from MCMC
        (:func:`~numpyro_ebm.sample`), never from its base measure.
    :raises UnhandledEnergyError: when its density is asked in a model without an energy, a
        ``numpyro.factor`` in its place.

    **Example**

    >>> import jax.numpy as jnp
    >>> import numpyro_ebm as ebm
    >>> ebm.Lebesgue(event_shape=(2,)).log_prob(jnp.ones((3, 2)))
    Array([0., 0., 0.], dtype=float32)
    """

    pytree_aux_fields = ("handled_by",)

    @checked
    def __init__(
        self,
        event_shape: tuple[int, ...] = (),
        support: constraints.Constraint = constraints.real,
        *,
        batch_shape: tuple[int, ...] = (),
        validate_args: bool | None = None,
    ):
        event_shape = _shape(event_shape, "Lebesgue")
        if support.is_discrete:
            raise ModelError(
                f"Lebesgue: the support {support} is discrete; use `Counting(num_values)`."
            )
        if _is_empty(support):
            raise ModelError(f"Lebesgue: {support} is empty: its lower bound is not the lower one.")
        if support.event_dim > len(event_shape):
            raise ModelError(
                f"Lebesgue: the support {support} needs an `event_shape` of at least "
                f"{support.event_dim} dimension(s), got {event_shape}."
            )
        self.handled_by = who_resolves()
        super().__init__(support, tuple(batch_shape), event_shape, validate_args=validate_args)

    def log_prob(self, value: ArrayLike, intermediates: Any = None) -> jax.Array:
        check_resolved(self, "dist.ImproperUniform(support, (), event_shape)")
        batch_shape = jnp.shape(value)[: jnp.ndim(value) - self.event_dim]
        flat = jnp.zeros(lax.broadcast_shapes(batch_shape, self.batch_shape))
        if is_real(self.support):
            return flat  # the whole space: NumPyro's check would turn NaN into -inf
        return jnp.where(self.support(value), flat, -jnp.inf)

    def sample(self, key: jax.Array | None, sample_shape: tuple[int, ...] = ()) -> jax.Array:
        raise ImproperSamplingError(
            f"Lebesgue(event_shape={self.event_shape}) is an improper base measure and has no "
            "draws: the energy decides where its site lives. Draw from the model with "
            "`numpyro_ebm.sample(rng_key, fixed(model, params), num_samples)`, at draws of a "
            "posterior with `numpyro_ebm.predictive(rng_key, model, posterior_samples, ...)`, or "
            "run `MCMC(numpyro_ebm.MALA(fixed(model, params)), ...)`; to evaluate the model at "
            "given values pass them through `obs=` or `numpyro.handlers.substitute`."
        )


class Counting(dist.Distribution):
    r"""Counting measure on :math:`\{0, …, K-1\}`: the flat base measure of a discrete site.

    .. math:: \log b(h) = 0 \quad \text{for } h \in \{0, …, K-1\}^{\text{event\_shape}}

    Unlike ``Bernoulli(0.5)`` it adds no constant to log Z, and NumPyro's
    enumeration sums it rightly, unlike ``Bernoulli.mask(False)``.

    :param int num_values: K, the number of values of one coordinate; 2 unless given. ``math.inf``
        for counts without an end: what sums over values, or draws them, refuses these, and
        :class:`~numpyro_ebm.DiscreteFisher` and :class:`~numpyro_ebm.NCE` do not.
    :param tuple event_shape: shape of one element of the site.
    :raises ModelError: if ``num_values`` is not an integer of at least 2, or infinite.
    :raises ImproperSamplingError: when infinitely many values are sampled.
    :raises UnhandledEnergyError: as :class:`Lebesgue`.

    .. note:: ``sample`` draws uniformly: it only serves NumPyro's MCMC kernels to initialise a
       chain. ``Predictive``, which would report such draws, is stopped by the energy statement.

    **Example**

    >>> import numpyro_ebm as ebm
    >>> ebm.Counting(num_values=2).enumerate_support()
    Array([0, 1], dtype=int32)
    """

    arg_constraints = {}
    pytree_aux_fields = ("num_values", "handled_by")

    @property
    def has_enumerate_support(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.num_values < math.inf

    @property
    def has_rsample(self) -> bool:
        """Never: NumPyro would say so of a distribution without parameters."""
        return False

    @checked
    def __init__(
        self,
        num_values: float = 2,
        event_shape: tuple[int, ...] = (),
        *,
        batch_shape: tuple[int, ...] = (),
        validate_args: bool | None = None,
    ):
        if num_values != math.inf:
            check_integer("Counting", 2, num_values=num_values)
        self.num_values, self.handled_by = num_values, who_resolves()
        super().__init__(
            tuple(batch_shape), _shape(event_shape, "Counting"), validate_args=validate_args
        )

    @constraints.dependent_property
    def support(self) -> Any:
        if self.num_values == math.inf:
            one = constraints.nonnegative_integer
        elif self.num_values == 2:
            one = constraints.boolean
        else:
            one = constraints.integer_interval(0, self.num_values - 1)
        return constraints.independent(one, len(self.event_shape)) if self.event_shape else one

    def sample(self, key: jax.Array, sample_shape: tuple[int, ...] = ()) -> jax.Array:  # pyright: ignore[reportIncompatibleMethodOverride]
        if self.num_values == math.inf:
            raise ImproperSamplingError(
                f"Counting(math.inf, event_shape={self.event_shape}) is an improper base measure "
                "of counts and has no draws. To draw from the model, give it an end that its mass "
                "does not reach, `Counting(num_values)`."
            )
        return jax.random.randint(key, self.shape(sample_shape), 0, self.num_values)

    def log_prob(self, value: ArrayLike, intermediates: Any = None) -> jax.Array:
        check_resolved(self, "dist.DiscreteUniform(0, num_values - 1)")
        batch_shape = jnp.shape(value)[: jnp.ndim(value) - self.event_dim]
        return jnp.zeros(lax.broadcast_shapes(batch_shape, self.batch_shape))

    def enumerate_support(self, expand: bool = True) -> jax.Array:
        if self.event_shape and is_enumerating():
            raise ModelError(
                f"Counting(event_shape={self.event_shape}) cannot be enumerated inside NumPyro: "
                "its parallel enumeration knows scalar sites only. Declare the units in a plate "
                '(`with numpyro.plate("units", n, dim=-2): ...`), or let numpyro_ebm do it: '
                "`Enumerated()`, `MALA` and `sample` enumerate event dimensions jointly."
            )
        values = jnp.arange(self.num_values).reshape(
            (-1,) + (1,) * (len(self.batch_shape) + len(self.event_shape))
        )
        if expand:
            values = jnp.broadcast_to(values, (self.num_values, *self.shape()))
        return values


class Unnormalized(dist.Distribution):
    """Distribution of an energy site: log-density -E, once its normalizer is resolved.

    Made by :func:`~numpyro_ebm.energy`; not a distribution to write into a model.

    :param energy: the energy, of the shape of the enclosing plates.
    :param str site_name: name of the energy, for the error.
    :param tuple parameters: names of the free parameters the normalizer depends on.
    :param handled_by: name of the handler that resolved the normalizer, or ``None``.
    """

    arg_constraints = {}
    support: Any = constraints.real
    pytree_data_fields = ("energy",)
    pytree_aux_fields = ("site_name", "parameters", "handled_by")

    def __init__(
        self,
        energy: jax.Array,
        site_name: str,
        parameters: Sequence[str] = (),
        handled_by: str | None = None,
        *,
        validate_args: bool | None = None,
    ):
        self.energy = energy
        self.site_name = site_name
        self.parameters = tuple(parameters)
        self.handled_by = handled_by
        # An event of size zero marks a site that carries no value, as in `numpyro.factor`.
        super().__init__(jnp.shape(energy), (0,), validate_args=validate_args)

    def sample(self, key: jax.Array | None, sample_shape: tuple[int, ...] = ()) -> jax.Array:
        return jnp.empty(sample_shape + self.batch_shape + self.event_shape)

    def log_prob(self, value: ArrayLike, intermediates: Any = None) -> jax.Array:
        if self.handled_by is None:
            if self.parameters:
                missing = "log Z(" + ", ".join(self.parameters) + ")"
            else:
                missing = "log Z"
            raise UnhandledEnergyError(
                f"The energy '{self.site_name}' is unnormalised: its density needs {missing}, "
                "which is missing here. Ways out: learn the parameters with an objective, "
                "`EnergySVI(..., loss=DenoisingScoreMatching(0.05))` or as the `loss` of "
                "`numpyro.infer.SVI`; hold them fixed, `fixed(model, params)`, after which every "
                "NumPyro tool may run on the model's visible and latent sites; or, for the "
                "posterior of parameters with priors, `normalized(model, log_normalizer)`, "
                "`generalized(model, objective)` or the kernel `Exchange(model, auxiliary)`."
            )
        shape = lax.broadcast_shapes(self.batch_shape, jnp.shape(value)[:-1])
        return jnp.broadcast_to(-self.energy, shape)


def _is_empty(support):
    """Whether the bounds of a support are known and in the wrong order somewhere."""
    support = getattr(support, "base_constraint", support)
    ends = getattr(support, "lower_bound", -math.inf), getattr(support, "upper_bound", math.inf)
    return all(map(not_jax_tracer, ends)) and bool(np.any(np.greater_equal(*ends)))
