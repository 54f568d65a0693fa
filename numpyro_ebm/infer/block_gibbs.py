# SPDX-License-Identifier: Apache-2.0
r"""Block Gibbs sampling of a fixed energy-based model as a NumPyro ``MCMCKernel``.

.. math:: x_B' \sim p(x_B \mid x_{-B}; θ) \quad \text{for every block } B \text{ in turn}

Conditionals are exact and nothing is tuned: the energy itself says, through the operations it is
made of, which blocks are Gaussian and which are independent Bernoullis. It is the sampler of
restricted Boltzmann machines, where a sweep costs a few evaluations of the energy, and the chain of
contrastive divergence.

Reference: Geman, Geman, *Stochastic relaxation, Gibbs distributions, and the Bayesian restoration
of images*, 1984; Hinton, *Training products of experts by minimizing contrastive divergence*, 2002.
"""

import copy
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.handlers import seed, substitute, trace
from numpyro.infer import init_to_uniform
from numpyro.infer.mcmc import MCMCKernel
from numpyro.util import is_prng_key, not_jax_tracer

from numpyro_ebm.errors import ModelError
from numpyro_ebm.joint import read_fixed
from numpyro_ebm.samplers import block_gibbs

__all__ = ["BlockGibbs", "BlockGibbsState"]


class BlockGibbsState(NamedTuple):
    """State of :class:`BlockGibbs`; fields can be collected as ``extra_fields``.

    - **i** - sweep counter, warm-up included.
    - **z** - dict of the values of all unobserved sites.
    - **potential_energy** - minus the log-density of every row, (rows,).
    - **rng_key** - key of the next sweep.
    """

    i: jax.Array
    z: dict
    potential_energy: jax.Array
    rng_key: jax.Array


class BlockGibbs(MCMCKernel):
    r"""Draw the unobserved sites of a fixed energy-based model from their exact conditionals.

    .. math:: x_B' \sim p(x_B \mid x_{-B}; θ) \quad \text{for every block } B \text{ in turn}

    Every row of the data plate is a chain of its own. Real sites in which the energy is quadratic
    are drawn as a Gaussian; binary sites in which it has degree one, all units at once; any other
    finite discrete site unit by unit, each of its values weighed by the energy.

    :param model: a model with fixed parameters, ``fixed(model, params)``.
    :param blocks: sequence of sequences of site names, drawn in this order, every unobserved site
        in one of them. By default every site is a block: continuous sites first, then discrete
        ones, in the order of the model. Real sites that are jointly Gaussian mix better in one
        block; discrete sites of a block that interact are drawn one unit after the other.
    :param init_strategy: NumPyro initialisation strategy.
    :raises ModelError: if ``blocks`` is not a partition of the unobserved sites; from ``init``, if
        the model has free parameters, a continuous site is not Gaussian given the rest or has
        another support than the reals, a discrete site has infinitely many values, a Gaussian
        conditional has no finite integral, or an energy is not finite at the initial values.

    Runs under NumPyro's ``MCMC``, with all its chain methods, and as a block of ``Gibbs`` beside
    :class:`~numpyro_ebm.MALA` or ``NUTS``. A Gaussian block of D coordinates whose energy is a sum
    over coordinates (no ``v @ A @ v``) costs two evaluations of the energy and its gradient, any
    other one D evaluations and a Cholesky factor per row; a Bernoulli block costs one; D units
    drawn in sequence, with K values each, cost D K.

    .. note:: The energy's operations are all that is looked at. A base measure
       ``Bernoulli(probs=...)`` hides its degree behind checks and is drawn unit by unit:
       ``Counting(2)`` with the logits in an energy is drawn at once.

    Reference: Geman, Geman, *Stochastic relaxation, Gibbs distributions, and the Bayesian
    restoration of images*, 1984; Hinton, *Training products of experts by minimizing contrastive
    divergence*, 2002.

    **Example**

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from numpyro.infer import MCMC
    >>> import numpyro_ebm as ebm
    >>> params = {"W": jnp.ones((2, 4)), "b": jnp.zeros(2), "c": -jnp.ones(4), "scale": jnp.ones(2)}
    >>> kernel = ebm.BlockGibbs(ebm.fixed(ebm.models.grbm, params), [["v"], ["h"]])
    >>> mcmc = MCMC(kernel, num_warmup=50, num_samples=100, progress_bar=False)
    >>> mcmc.run(jax.random.key(0), num_rows=7)
    >>> draws = mcmc.get_samples()
    >>> draws["v"].shape, draws["h"].shape
    ((100, 7, 2), (100, 7, 4))
    """

    sample_field = "z"

    def __init__(self, model, blocks=None, *, init_strategy=init_to_uniform):
        if blocks is not None:
            if isinstance(blocks, str) or any(isinstance(names, str) for names in blocks):
                raise ModelError(
                    "BlockGibbs: `blocks` is a sequence of sequences of site names, such as "
                    f'[["v"], ["h"]], got {blocks!r}.'
                )
            blocks = tuple(tuple(names) for names in blocks if names)
        self._model = model
        self._blocks = blocks
        self._init_strategy = init_strategy
        self._sample_fn = None  # looked at by `MCMC`: whether `init` has run

    @property
    def model(self):
        return self._model

    @property
    def default_fields(self):
        return ("z", "potential_energy")

    def get_diagnostics_str(self, state):
        return "exact conditionals"

    def init(self, rng_key, num_warmup, init_params, model_args, model_kwargs):
        self._sample_fn = self._step
        # The check is for people: under `jit` its verdict could not be told.
        check = not_jax_tracer(jax.tree.leaves(rng_key)[0])

        def init_one(rng_key, init_params):
            return self._init(rng_key, init_params, model_args, model_kwargs, check)

        if not is_prng_key(rng_key):
            init_one = jax.vmap(init_one, (0, None if init_params is None else 0))
        # Compiled as a whole: operation by operation it takes seconds.
        state, is_proper = jax.jit(init_one)(rng_key, init_params)
        bad = ~jnp.isfinite(state.potential_energy)
        if not_jax_tracer(bad) and np.any(bad):
            raise ModelError(
                f"BlockGibbs: the energy is not finite at the initial values of {int(np.sum(bad))} "
                f"of {bad.size} rows. Pass `init_params`, or an `init_strategy` such as "
                "`numpyro.infer.init_to_value(values=...)`."
            )
        for name, proper in is_proper.items():
            if not_jax_tracer(proper) and not np.all(proper):
                raise ModelError(
                    f"BlockGibbs: the site '{name}' has no Gaussian conditional that can be "
                    "normalised: the energy does not grow in all its directions (its Hessian is "
                    "not positive definite)."
                )
        return state

    def sample(self, state, model_args, model_kwargs):
        if is_prng_key(state.rng_key):
            return self._step(state, model_args, model_kwargs)
        return jax.vmap(lambda s: self._step(s, model_args, model_kwargs))(state)

    def refresh(self, state, model_args, model_kwargs):
        joint, log_density = self._target(model_args, model_kwargs)
        return state._replace(potential_energy=-log_density(joint.to_rows(state.z)))

    def wrap_model(self, wrapper):
        kernel = copy.copy(self)
        kernel._model = wrapper(self._model)
        kernel._sample_fn = None
        return kernel

    def get_constrain_fn(self, model_args, model_kwargs):
        return lambda z: z  # real and discrete sites only: they are their own coordinates

    def postprocess_fn(self, model_args, model_kwargs):
        joint = read_fixed(self._model, model_args, model_kwargs)

        return lambda z: {**z, **joint.deterministic({}, z)}

    # Inside

    def _target(self, model_args, model_kwargs):
        joint = read_fixed(self._model, model_args, model_kwargs)
        for name, site in joint.visible.items():
            if not site.is_real:
                raise ModelError(
                    f"BlockGibbs: the site '{name}' has the support {site.fn.support}, and only "
                    "real and finite discrete sites are drawn exactly. "
                    + block_gibbs.advice([name], set(joint.sites) - {name})
                )

        def log_density(rows):
            return joint.log_density({}, joint.from_rows(rows))

        return joint, log_density

    def _plan(self, joint, log_density, rows):
        # Sites that lost their observations, and start at them, wait until the others follow them.
        order = sorted(joint.sites, key=lambda name: name in joint.released)
        blocks = self._blocks or tuple((name,) for name in order)
        named = [name for names in blocks for name in names]
        wrong = sorted(set(named) ^ set(joint.sites)) or sorted(
            {name for name in named if named.count(name) > 1}
        )
        if wrong:
            raise ModelError(
                f"BlockGibbs: `blocks` must name each unobserved site once: {sorted(joint.sites)}; "
                f"{wrong} are missing, unknown or named twice."
            )
        values = {name: _support_values(site) for name, site in joint.latent.items()}
        return [block_gibbs.plan_block(log_density, rows, names, values) for names in blocks]

    def _check_order(self, joint, init_params):
        """Values that a chain is to start from may not be drawn anew before the others follow."""
        later = [name for names in self._blocks or () for name in names]
        while later and joint.released:
            name, *later = later
            lost = [x for x in later if x not in joint.released and x not in (init_params or {})]
            if name in joint.released and lost:
                raise ModelError(
                    f"BlockGibbs: the chain starts at the data of '{name}', and the block order "
                    f"{self._blocks} draws '{name}' anew before {lost}, which have no start of "
                    "their own. Put the latent sites first."
                )

    def _init(self, rng_key, init_params, model_args, model_kwargs, check):
        key_init, key_check, rng_key = jax.random.split(rng_key, 3)
        joint, log_density = self._target(model_args, model_kwargs)
        prepared = substitute(seed(joint.model, key_init), substitute_fn=self._init_strategy)
        model_trace = trace(prepared).get_trace(*joint.args, **joint.kwargs)
        z = {name: jnp.asarray(model_trace[name]["value"]) for name in joint.sites}
        self._check_order(joint, init_params)
        for name, x in (init_params or {}).items():
            if name not in z or jnp.shape(x) != z[name].shape:
                shapes = {k: v.shape for k, v in z.items()}
                raise ModelError(
                    f"`init_params` has '{name}' of shape {jnp.shape(x)}; the unobserved sites "
                    f"and their shapes are {shapes}."
                )
            z[name] = jnp.asarray(x, z[name].dtype)
        rows = joint.to_rows(z)
        blocks = self._plan(joint, log_density, rows)
        is_proper = {}
        for block in blocks if check else ():
            if block.kind == "gaussian":
                draws = block_gibbs.draw_block(key_check, rows, log_density, block)
                is_proper.update({k: jnp.all(jnp.isfinite(x)) for k, x in draws.items()})
        state = BlockGibbsState(jnp.array(0), z, -log_density(rows), rng_key)
        return state, is_proper

    def _step(self, state, model_args, model_kwargs):
        joint, log_density = self._target(model_args, model_kwargs)
        rng_key, key_step = jax.random.split(state.rng_key)
        rows = joint.to_rows(state.z)
        blocks = self._plan(joint, log_density, rows)
        chains = block_gibbs.BlockGibbsState(rows, -state.potential_energy)
        chains, _ = block_gibbs.build_kernel()(key_step, chains, log_density, blocks)
        return BlockGibbsState(
            state.i + 1, joint.from_rows(chains.position), -chains.logdensity, rng_key
        )


def _support_values(site):
    """The values of one coordinate of a discrete site, as a NumPy array of shape (K,)."""
    fn = site.fn
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    if not fn.has_enumerate_support:
        raise ModelError(
            f"BlockGibbs: the site '{site.name}' ({type(fn).__name__}) has no finite number of "
            "values to weigh."
        )
    with jax.ensure_compile_time_eval():  # concrete inside of `jit` too
        values = np.asarray(fn.enumerate_support(expand=False))
    if values.size != len(values):
        raise ModelError(
            f"BlockGibbs: the values of the site '{site.name}' ({type(fn).__name__}) are arrays, "
            "not numbers; write it with `Counting(num_values)`."
        )
    return values.ravel()
