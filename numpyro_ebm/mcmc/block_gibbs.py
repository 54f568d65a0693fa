# SPDX-License-Identifier: Apache-2.0
r"""Block Gibbs sampling of a fixed energy-based model as a NumPyro ``MCMCKernel``.

.. math:: x_B' \sim p(x_B \mid x_{-B}; θ) \quad \text{for every block } B \text{ in turn}

Conditionals are exact and nothing is tuned: the energy itself says, through the operations it is
made of, which blocks are Gaussian, which are independent Bernoullis, and which units of a lattice
do not interact. It is the sampler of restricted Boltzmann machines and of Ising and Potts models,
where a sweep costs a few evaluations of the energy, and the chain of contrastive divergence.

Reference: Geman, Geman, *Stochastic relaxation, Gibbs distributions, and the Bayesian restoration
of images*, 1984; Hinton, *Training products of experts by minimizing contrastive divergence*, 2002.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.infer import init_to_uniform

from numpyro_ebm._compat import is_prng_key, not_jax_tracer
from numpyro_ebm.errors import ModelError, field_or_item
from numpyro_ebm.mcmc.block_gibbs_plan import (
    check_colors,
    check_order,
    parse_blocks,
    parse_colors,
    plan_blocks,
)
from numpyro_ebm.mcmc.row_kernel import RowKernel
from numpyro_ebm.mcmc.start import initial_values
from numpyro_ebm.model.row_model import RowModel
from numpyro_ebm.samplers import block_gibbs
from numpyro_ebm.samplers.gibbs_blocks import Block, advice
from numpyro_ebm.types import LogDensity, Model, SiteValues

__all__ = ["BlockGibbs", "BlockGibbsState"]


class BlockGibbsState(NamedTuple):
    """State of :class:`BlockGibbs`; fields can be collected as ``extra_fields``.

    - **i** - sweep counter, warm-up included.
    - **z** - dict of the values of all unobserved sites.
    - **potential_energy** - minus the log-density of every row, (rows,).
    - **rng_key** - key of the next sweep.
    """

    i: jax.Array
    z: SiteValues
    potential_energy: jax.Array
    rng_key: jax.Array

    __getitem__ = field_or_item


class BlockGibbs(RowKernel):
    r"""Draw the unobserved sites of a fixed energy-based model from their exact conditionals.

    .. math:: x_B' \sim p(x_B \mid x_{-B}; θ) \quad \text{for every block } B \text{ in turn}

    Every row of the data plate is a chain of its own. Real sites in which the energy is quadratic
    are drawn as a Gaussian; binary sites in which it has degree one, all units at once; the units
    of any other finite discrete site in groups that do not interact, found by colouring the graph
    of their interactions: the two fields of a checkerboard for a lattice of spins.

    :param model: a model with fixed parameters, ``fixed(model, params)``.
    :param blocks: sequence of sequences of site names, drawn in this order, every unobserved site
        in one of them. By default every site is a block: continuous sites first, then discrete
        ones, in the order of the model. Real sites that are jointly Gaussian mix better in one
        block.
    :param dict colors: by the name of a discrete site, an array of integers of its event shape:
        units of equal colour are declared to be conditionally independent given all others. For
        energies whose interactions cannot be found; a site with declared colours is drawn apart
        from the others of its block.
    :param bool reversible: make every sweep there and back again. A sweep in one order has the
        right stationary law without being reversible, which ``Exchange`` asks for with bridges.
    :param init_strategy: NumPyro initialisation strategy.
    :raises ModelError: if ``blocks`` is not a partition of the unobserved sites, or ``colors`` does
        not fit them; from ``init``, if the model has free parameters, a continuous site is not
        Gaussian given the rest or has another support than the reals, a discrete site has
        infinitely many values, a Gaussian conditional has no finite integral, two units of a
        declared colour interact, or an energy is not finite at the initial values.

    Runs under NumPyro's ``MCMC``, with all its chain methods, and as a block of ``Gibbs`` beside
    :class:`~numpyro_ebm.MALA` or ``NUTS``. A Gaussian block of D coordinates whose energy is a sum
    over coordinates (no ``v @ A @ v``) costs two evaluations of the energy and its gradient, any
    other one D evaluations and a Cholesky factor per row; a Bernoulli block costs one. Units of any
    number of values with C colours cost C gradients where the energy is a sum of products of tables
    of single units, however it is written; units that all interact, in pairs, one product of
    matrices for all of them; products of three and more, such as the triangles of a network, those
    that hold the units of a colour, where that is less. Else D units of K values cost the D K
    evaluations that they cost one by one, in C batches. :meth:`plan` tells which it is (its
    ``form``).

    .. note:: The energy's operations are all that is looked at. A base measure
       ``Bernoulli(probs=...)`` hides its degree behind checks, and its units are weighed one by
       one: ``Counting(2)`` with the logits in an energy is drawn at once. Couplings count with
       their values, so that a matrix of zeros and ones has the graph of its ones; where they are
       not known yet, such as parameters that are traced by ``jax.jit``, all units that they join
       interact. Operations without a known rule (loops, convolutions, sorting) make all units
       interact that go into them; they are drawn one after the other, unless ``colors`` says more.

    .. note:: Declared colours are tried at random states before the first sweep, twenty a row, and
       refused with the first pair that is found to interact. An interaction smaller than the
       rounding of the energy is not found.

    Reference: Geman, Geman, *Stochastic relaxation, Gibbs distributions, and the Bayesian
    restoration of images*, 1984; Hinton, *Training products of experts by minimizing contrastive
    divergence*, 2002; Gonzalez et al., *Parallel Gibbs sampling: from colored fields to thin
    junction trees*, 2011.

    **Example**

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import numpyro
    >>> from numpyro.infer import MCMC
    >>> import numpyro_ebm as ebm
    >>> params = {"W": jnp.ones((2, 4)), "b": jnp.zeros(2), "c": -jnp.ones(4), "scale": jnp.ones(2)}
    >>> kernel = ebm.BlockGibbs(ebm.fixed(ebm.models.grbm, params), [["v"], ["h"]])
    >>> mcmc = MCMC(kernel, num_warmup=50, num_samples=100, progress_bar=False)
    >>> mcmc.run(jax.random.key(0), num_rows=7)
    >>> draws = mcmc.get_samples()
    >>> draws["v"].shape, draws["h"].shape
    ((100, 7, 2), (100, 7, 4))

    A lattice of spins has two colours:

    >>> def ising(num_rows=1):
    ...     with numpyro.plate("data", num_rows):
    ...         s = 2 * numpyro.sample("s", ebm.Counting(2, (6, 6))) - 1
    ...         bonds = s * jnp.roll(s, 1, -1) + s * jnp.roll(s, 1, -2)
    ...         ebm.energy("E", -0.3 * jnp.sum(bonds, (-1, -2)))
    >>> [block] = ebm.BlockGibbs(ebm.fixed(ising, {})).plan()
    >>> block.kind, int(block.colors.max()) + 1
    ('coloured', 2)
    """

    moves_discrete = True
    _draw_start = staticmethod(initial_values)

    def __init__(
        self,
        model: Model,
        blocks: Sequence[Sequence[str]] | None = None,
        *,
        colors: dict[str, Any] | None = None,
        reversible: bool = False,
        init_strategy: Callable[..., Any] = init_to_uniform,
    ):
        self._blocks = parse_blocks(blocks)
        self._colors = parse_colors(colors)
        self.is_reversible = reversible
        super().__init__(model, init_strategy)

    @property
    def default_fields(self) -> tuple[str, ...]:
        return ("z", "potential_energy")

    def get_diagnostics_str(self, state: Any) -> str:
        return "exact conditionals"

    def plan(self, *args: Any, **kwargs: Any) -> list[Block]:
        """How the blocks are drawn.

        :param args: arguments of the model.
        :param kwargs: keyword arguments of the model.
        :return: list of :class:`~numpyro_ebm.samplers.gibbs_blocks.Block`, in the order of drawing.
        """
        row_model, log_density = self._target(args, kwargs)
        z = {name: jnp.asarray(site.value) for name, site in row_model.sites.items()}
        return self._plan(row_model, log_density, row_model.to_rows(z))

    def init(
        self,
        rng_key: jax.Array,
        num_warmup: int,
        init_params: Any,
        model_args: tuple[Any, ...],
        model_kwargs: dict[str, Any] | None,
    ) -> Any:
        self._sample_fn = self._step
        # Under `jit` the result of the check is traced, and an error could not be raised.
        check = not_jax_tracer(jax.tree.leaves(rng_key)[0])

        def init_one(rng_key, init_params):
            return self._init_checked(rng_key, init_params, model_args, model_kwargs, check)

        state, is_proper = self._init_chains(init_one, rng_key, init_params)
        bad = ~jnp.isfinite(state.potential_energy)
        if not_jax_tracer(bad) and np.any(bad):
            self._check_energy(state, model_args, model_kwargs)
        for name, proper in is_proper.items():
            if not_jax_tracer(proper) and not np.all(proper):
                raise ModelError(
                    f"BlockGibbs: the site '{name}' has no Gaussian conditional that can be "
                    "normalised: the energy does not grow in all its directions (its Hessian is "
                    "not positive definite)."
                )
        if self._colors and check and not_jax_tracer(state.potential_energy):
            self._check_colors(rng_key, state, model_args, model_kwargs)
        self._num_warmup = num_warmup
        self._start_watch(state, num_warmup, model_args, model_kwargs)
        return state

    def refresh(
        self, state: Any, model_args: tuple[Any, ...], model_kwargs: dict[str, Any] | None
    ) -> BlockGibbsState:
        row_model, log_density = self._target(model_args, model_kwargs)
        rows = row_model.to_rows(state.z)
        return state._replace(potential_energy=-log_density(rows))

    # Internal

    def _target(self, model_args, model_kwargs):
        return self._read(self._model, model_args, model_kwargs)

    def _read(self, model, model_args, model_kwargs) -> tuple[RowModel, LogDensity]:
        row_model = self._read_model(model, model_args, model_kwargs)
        for name, site in row_model.visible.items():
            if not site.is_real:
                raise ModelError(
                    f"BlockGibbs: the site '{name}' has the support {site.fn.support}, and only "
                    "real and finite discrete sites are drawn exactly. "
                    + advice([name], set(row_model.sites) - {name})
                )

        def log_density(rows):
            return row_model.log_density({}, row_model.from_rows(rows))

        return row_model, log_density

    def _plan(self, row_model, log_density, rows):
        return plan_blocks(row_model, log_density, rows, self._blocks, self._colors)

    def _check_colors(self, rng_key, state, model_args, model_kwargs):
        row_model, log_density = self._target(model_args, model_kwargs)
        z = state.z
        while not is_prng_key(rng_key):  # one of the vectorised chains will do
            rng_key, z = rng_key[0], {name: x[0] for name, x in z.items()}
        rows = row_model.to_rows(z)
        plan = self._plan(row_model, log_density, rows)
        check_colors(rng_key, log_density, rows, plan, self._colors)

    def _init_checked(self, rng_key, init_params, model_args, model_kwargs, check):
        key_init, key_check, rng_key = jax.random.split(rng_key, 3)
        row_model, log_density = self._target(model_args, model_kwargs)
        check_order(row_model, self._blocks, init_params)
        z = self._initial_values(key_init, row_model, init_params)
        rows = row_model.to_rows(z)
        blocks = self._plan(row_model, log_density, rows)
        is_proper = {}
        for block in blocks if check else ():
            if block.kind == "gaussian":
                draws = block_gibbs.draw_block(key_check, rows, log_density, block)
                is_proper.update({k: jnp.all(jnp.isfinite(x)) for k, x in draws.items()})
        energy = -log_density(rows)
        state = BlockGibbsState(jnp.array(0), z, energy, rng_key)
        return state, is_proper

    def _step(self, state, model_args, model_kwargs):
        row_model, log_density = self._target(model_args, model_kwargs)
        rng_key, key_step = jax.random.split(state.rng_key)
        rows = row_model.to_rows(state.z)
        blocks = self._plan(row_model, log_density, rows)
        chains = block_gibbs.BlockGibbsChainState(rows, -state.potential_energy)
        chains, _ = block_gibbs.build_kernel(self.is_reversible)(
            key_step, chains, log_density, blocks
        )
        energy = -chains.logdensity
        return BlockGibbsState(state.i + 1, row_model.from_rows(chains.position), energy, rng_key)
