# SPDX-License-Identifier: Apache-2.0
r"""Integrate real latent sites out in closed form, where the energy is quadratic in them.

.. math:: \log\tilde p(v; θ) = \log\int \tilde p(v, h; θ)\, dh
    = \log\tilde p(v, h^*; θ) + \tfrac{D}{2} \log 2π - \tfrac12 \log\det P,
    \qquad P = -∇_h^2 \log\tilde p(v, h; θ)

with :math:`h^*` the mode of the posterior, which is the Gaussian :math:`N(h^*, P^{-1})`; P may
depend on v. Discrete latent sites beside them are summed state by state: given v the latents are
then conditionally Gaussian. Use it for factor analysis and probabilistic PCA, for restricted
Boltzmann machines with Gaussian or spike-and-slab hidden units, and for random effects.

That the log-density is quadratic is read off its operations, and holds everywhere; a posterior
that is not Gaussian is refused, and not approximated by one.

Reference: Tipping, Bishop, *Probabilistic principal component analysis*, JRSS B 1999; Lauritzen,
Wermuth, *Graphical models for associations between variables, some of which are qualitative and
some quantitative*, Annals of Statistics 1989.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jax.scipy.special import logsumexp

from numpyro_ebm.errors import check_integer
from numpyro_ebm.marginals.base import ExactMarginal
from numpyro_ebm.model.finite_supports import in_all_rows, joint_states, num_joint_states
from numpyro_ebm.model.row_model import RowModel
from numpyro_ebm.program.polynomial import structure
from numpyro_ebm.samplers.gaussian_conditional import expand_quadratic, why_not_gaussian
from numpyro_ebm.samplers.positions import flatten_sites
from numpyro_ebm.types import Params, SiteValues

__all__ = ["GaussianLatents"]


class GaussianLatents(ExactMarginal):
    """The exact marginal of a model whose real latent sites are jointly Gaussian given the rest.

    :param int max_states: the most joint states of discrete latent sites beside them, per row.
    :raises ModelError: when used on a model in which no latent site is real, one has a bounded
        support, or the log-density is not quadratic in them as far as its operations tell; on more
        states than ``max_states``.

    Where log p̃ does not fall in every direction of h the integral diverges, and its logarithm is
    NaN.

    **Example**

    >>> import jax, jax.numpy as jnp, numpyro
    >>> import numpyro.distributions as dist
    >>> import numpyro_ebm as ebm
    >>> def ppca(data, W):
    ...     with numpyro.plate("data", len(data)):
    ...         v = numpyro.sample("v", ebm.Lebesgue((3,)), obs=data)
    ...         h = numpyro.sample("h", dist.Normal(0, 1).expand([2]).to_event(1))
    ...         ebm.energy("E", 0.5 * jnp.sum((v - h @ W.T) ** 2, -1))
    >>> data, W = jnp.ones((2, 3)), jnp.ones((3, 2))
    >>> log_density = ebm.log_likelihood(jax.random.key(0), ebm.fixed(ppca, {}), data, W)
    >>> exact = dist.MultivariateNormal(jnp.zeros(3), W @ W.T + jnp.eye(3)).log_prob(data)
    >>> bool(jnp.allclose(log_density, exact, rtol=1e-5))
    True
    """

    def __init__(self, *, max_states: int = 4_096):
        check_integer("GaussianLatents", max_states=max_states)
        self.max_states = max_states

    def why_not(self, row_model: RowModel) -> str | None:
        real, discrete = _real_and_discrete(row_model)
        if not real:
            return f"GaussianLatents() is for real latent sites, and {discrete} are none."
        for name in real:
            if not row_model.latent[name].is_real:
                return (
                    f"GaussianLatents(): the latent site '{name}' takes values in "
                    f"{row_model.latent[name].fn.support}, and not all real numbers. Use `VaGES()` "
                    "with a guide."
                )
        states = num_joint_states(row_model, discrete, "GaussianLatents")
        if states > self.max_states:
            return (
                f"GaussianLatents(): the discrete latent sites {discrete} have {states:.6g} joint "
                f"states per row, more than max_states={self.max_states}. Use `VaGES()` with a "
                "guide."
            )
        why_not = why_not_gaussian(_structure(row_model))
        if why_not:
            return (
                f"GaussianLatents() cannot integrate {real} out in closed form: the log-density "
                f"{why_not}. Use `VaGES()` with a guide."
            )
        return None

    def num_states(self, row_model: RowModel) -> float:
        return num_joint_states(row_model, _real_and_discrete(row_model)[1], "GaussianLatents")

    def log_density(self, row_model: RowModel, params: Params, values: SiteValues) -> jax.Array:
        return logsumexp(self._at_states(row_model, params, values)[0], 0)

    def conditional(
        self, row_model: RowModel, params: Params, values: SiteValues
    ) -> Callable[[jax.Array], SiteValues]:
        log_densities, forms = self._at_states(row_model, params, values)
        states = self._states(row_model)
        _, unflatten = _flat(row_model)
        rows = jnp.arange(row_model.num_rows)

        def draw(rng_key):
            key_states, key_real = jax.random.split(rng_key)
            chosen = jax.random.categorical(key_states, log_densities, axis=0)  # (rows,)
            form = jax.tree.map(lambda x: x[chosen, rows], forms)
            drawn = {name: x[chosen] for name, x in states.items()}
            drawn |= unflatten(form.draw(key_real))
            types = {name: jnp.result_type(site.value) for name, site in row_model.latent.items()}
            return row_model.from_rows({name: x.astype(types[name]) for name, x in drawn.items()})

        return draw

    def _states(self, row_model):
        _, discrete = _real_and_discrete(row_model)
        return joint_states(row_model, discrete, "GaussianLatents")

    def _at_states(self, row_model, params, values):
        """log p̃ and the quadratic form of h at every state of the discrete sites, states leading.

        The form stands at the posterior's mode: in single precision log p̃ at zero, far from it,
        would lose the digits that count. It is the same from any point, so that the mode is a
        constant to all derivatives.
        """
        is_diagonal = _structure(row_model).separable
        zero, unflatten = _flat(row_model)

        def at_state(state):
            discrete = in_all_rows(row_model, state)

            def log_density(x):
                latent = {**discrete, **row_model.from_rows(unflatten(x))}
                return row_model.log_density(params, {**values, **latent})

            form = expand_quadratic(log_density, zero, is_diagonal)
            mode = stop_gradient(form.mean)
            gradient = jax.grad(lambda x: jnp.sum(log_density(x)))(mode)
            form = form._replace(point=mode, gradient=gradient)
            return form.log_integral(log_density(mode)), form

        states = self._states(row_model)
        if not states:
            return jax.tree.map(lambda x: x[None], at_state({}))
        return jax.vmap(at_state)(states)


def _real_and_discrete(row_model):
    """Names of the real and of the discrete latent sites."""
    latent = row_model.latent.items()
    discrete = [name for name, site in latent if site.is_discrete]
    return [name for name, site in latent if not site.is_discrete], discrete


def _flat(row_model):
    """Zeros of shape (rows, D), for all real latent coordinates, and the way back to sites."""
    real, _ = _real_and_discrete(row_model)
    zeros = {name: jnp.zeros_like(row_model.latent[name].value) for name in real}
    return flatten_sites(row_model.to_rows(zeros), real)


def _structure(row_model):
    """How the row log-joint depends on the real latents, whatever else a row and θ hold."""
    return row_model.remember("real latents", lambda: _find_structure(row_model))


def _find_structure(row_model):
    zero, unflatten = _flat(row_model)
    found = []

    def at(params, values):
        def log_density(x):
            latent = row_model.from_rows(unflatten(x))
            return row_model.log_density(params, {**values, **latent})

        found.append(structure(log_density, zero))

    # Traced, so that nothing is read off the values at hand.
    others = {k: s.value for k, s in row_model.sites.items() if k not in unflatten(zero)}
    jax.eval_shape(at, row_model.parameters, others)
    return found[0]
