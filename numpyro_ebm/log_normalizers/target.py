# SPDX-License-Identifier: Apache-2.0
r"""A fixed model as the density whose integral is sought: positions in, log-densities out.

A position is a dict of arrays with points leading: real sites in unconstrained coordinates (the
log-Jacobian is part of the density), discrete sites in their values. Rows of the data plate that
share their log Z are so many points evaluated at once; where every row has a log Z of its own,
point i belongs to row i modulo their number.
"""

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.distributions import ImproperUniform, MaskedDistribution
from numpyro.handlers import seed, trace
from numpyro.ops.provenance import eval_provenance
from numpyro.util import not_jax_tracer

from numpyro_ebm.errors import ModelError
from numpyro_ebm.language.distributions import Counting
from numpyro_ebm.language.handlers import resolve_normalizer, uncondition
from numpyro_ebm.language.sites import layers
from numpyro_ebm.log_normalizers.path import flatten, unflatten
from numpyro_ebm.marginals import exact_marginal
from numpyro_ebm.model import provenance
from numpyro_ebm.model.finite_supports import finite_values
from numpyro_ebm.model.row_model import read_fixed_model, read_model

__all__ = ["Target", "read_target"]

HUGE = 1e15
"""No model has values like this; chains that follow a falling energy do."""


class Target:
    """A fixed model as an unnormalised density.

    - **row_model** - the model, its visible sites the unobserved real ones, its latent sites the
      unobserved discrete ones.
    - **is_shared** - whether all rows share their log Z.
    - **num_problems** - 1 if they do, else the number of rows.
    - **real, discrete** - names of the sites that are coordinates of a position.
    - **summed** - whether the discrete sites are summed out of the density instead.
    - **data** - observed values of released real sites, unconstrained, rows leading.
    """

    def __init__(self, row_model, is_shared, data, summed=False):
        self.row_model, self.is_shared, self.data = row_model, is_shared, data
        self.num_problems = 1 if is_shared else row_model.num_rows
        self.summed = summed
        self.real = tuple(sorted(row_model.visible))
        self.discrete = () if summed else tuple(sorted(row_model.latent))
        self.proper = self._proper_sites()

    def sum_out(self):
        """The same with its discrete sites summed out; raises ModelError if that is too much."""
        exact_marginal(self.row_model)
        return Target(self.row_model, self.is_shared, self.data, summed=True)

    @property
    def size_real(self):
        """Number of real coordinates."""
        return sum(int(np.size(x)) for x in self._one().values() if x.dtype.kind == "f")

    def values(self, name):
        """The values of one coordinate of a discrete site."""
        lowest, num_values = finite_values(self.row_model.latent[name], "log_normalizer")
        return lowest + np.arange(num_values)

    def size(self, name):
        """Number of coordinates of a site in a row."""
        return int(np.size(self._one()[name]))

    def coordinate_names(self):
        """The site of every real coordinate, in the order of :func:`flatten`."""
        one = self._one()
        return [name for name in self.real for _ in range(int(np.size(one[name])))]

    def placeholder(self, num):
        """A position of ``num`` points."""
        return {k: jnp.broadcast_to(x, (num, *x.shape)) for k, x in self._one().items()}

    # Densities

    def log_density(self, position):
        """The unnormalised log-density, of shape (n,)."""
        return self.over_rows(lambda rows: self._densities(rows)[1])(position)

    def log_densities(self, position):
        """Log-densities of the proper part of the base measure and of the target, (n,) each.

        The flat measure of discrete sites counts as uniform.
        """
        return self.over_rows(self._densities)(position)

    def draw(self, rng_key, num, flat):
        """Draw the proper sites, and flat discrete ones uniformly.

        :param int num: number of points.
        :param dict flat: values of the flat real sites, (num, ...), in unconstrained coordinates.
        :return: a position.
        """
        keys = jax.random.split(rng_key, -(-num // self.row_model.num_rows))
        return self.over_rows(self._ancestral, keys)(flat, num)

    def reference(self, gaussian):
        """Log-densities of the reference and the target, and draws of the reference.

        :param Gaussian gaussian: the reference of the flat real sites.
        """
        flat = self.flat_real
        if not flat:
            return self.log_densities, lambda rng_key, num: self.draw(rng_key, num, {})

        def log_densities(position):
            base, target = self.log_densities(position)
            return base + gaussian.log_prob(flatten(position, flat)), target

        def draw(rng_key, num):
            key_flat, key_rest = jax.random.split(rng_key)
            x = gaussian.sample(key_flat, num)
            return self.draw(key_rest, num, unflatten(x, self.placeholder(1), flat))

        return log_densities, draw

    @property
    def flat_real(self):
        """Real sites with an improper base measure."""
        return tuple(name for name in self.real if name not in self.proper)

    def start(self, rng_key, num):
        """Where chains start: at data, where there are some, else widely spread."""
        key_scale, key_rows, key_draw, *keys = jax.random.split(rng_key, 3 + len(self.real))
        scale = jnp.exp(jax.random.uniform(key_scale, (num,), float, -1.0, 1.5))
        one, position = self._one(), {}
        for name, key in zip(self.real, keys, strict=True):
            noise = jax.random.normal(key, (num, *one[name].shape), one[name].dtype)
            factor = jnp.reshape(scale, (-1,) + (1,) * one[name].ndim)
            position[name] = noise * factor.astype(noise.dtype)
        if self.proper or self.discrete:
            position = {**position, **self.draw(key_draw, num, position)}
        if self.data:
            rows = len(next(iter(self.data.values())))
            at = jax.random.randint(key_rows, (num,), 0, rows)
            if self.num_problems > 1:
                at = jnp.arange(num) % rows
            position |= {name: x[at].astype(position[name].dtype) for name, x in self.data.items()}
        return position

    def are_sane(self, position):
        """Whether the values of a position are of a size that a model could mean."""

        def of_rows(rows):
            values, _ = self.row_model.constrain(self.row_model.from_rows(rows))
            size = sum(
                jnp.max(jnp.abs(jnp.reshape(x, (self.row_model.num_rows, -1))), 1)
                for x in self.row_model.to_rows(values).values()
            )
            return size < HUGE

        real = {name: position[name] for name in self.real}
        return self.over_rows(of_rows)(real)

    # Inside

    def _one(self):
        """A placeholder of one point."""
        row_model = self.row_model
        if not hasattr(self, "_one_point"):
            shapes = jax.eval_shape(lambda: row_model.to_rows(_unconstrained(row_model)))
            self._one_point = {
                name: np.zeros(x.shape[1:], x.dtype)
                if name in row_model.visible
                else np.full(x.shape[1:], self.values(name)[0], x.dtype)
                for name, x in shapes.items()
                if name in (*self.real, *self.discrete)
            }
        return self._one_point

    def _proper_sites(self):
        row_model = self.row_model
        model_trace = trace(row_model.substituted(self._site_values())).get_trace(
            *row_model.args, **row_model.kwargs
        )
        names = (*self.real, *self.discrete)
        return frozenset(
            name
            for name in names
            if _is_proper(model_trace[name]["fn"])
            and _is_one(model_trace[name]["scale"], row_model._scale)
        )

    def _site_values(self):
        return {name: site.value for name, site in self.row_model.sites.items()}

    def _densities(self, rows):
        row_model = self.row_model
        z = row_model.from_rows(rows)
        proper = {k: x for k, x in z.items() if k in self.real and k in self.proper}
        flat = {k: x for k, x in z.items() if k in self.real and k not in self.proper}
        values = {k: x for k, x in z.items() if k in self.discrete}
        flat, log_det_flat = row_model.constrain(flat)
        proper, log_det = row_model.constrain(proper)
        values = {**values, **flat, **proper}
        shape = (row_model.num_rows,)
        if self.summed:
            target = exact_marginal(row_model).log_density(row_model, {}, values)
            target = target + log_det + log_det_flat
            return jnp.zeros(shape, target.dtype), jnp.broadcast_to(target, shape)
        model_trace = trace(row_model.substituted(values)).get_trace(
            *row_model.args, **row_model.kwargs
        )
        densities = row_model.site_log_densities(model_trace)
        target = sum(densities.values()) + log_det + log_det_flat
        base = sum((densities[name] for name in sorted(self.proper)), log_det)
        for name in self.discrete:
            if name not in self.proper:
                base = base - self.size(name) * np.log(len(self.values(name)))
        target = jnp.broadcast_to(target, shape)
        return jnp.broadcast_to(base, shape).astype(target.dtype), target

    def _ancestral(self, rows, rng_key):
        """Draw all sites but the flat real ones, which are given, for one plate of rows."""
        row_model = self.row_model
        given, _ = row_model.constrain(row_model.from_rows(rows))
        key_model, *keys = jax.random.split(rng_key, 1 + len(self.discrete))
        for name, key in zip(self.discrete, keys, strict=True):
            if name not in self.proper:
                value, choices = row_model.latent[name].value, self.values(name)
                index = jax.random.randint(key, jnp.shape(value), 0, len(choices))
                given[name] = jnp.asarray(choices, jnp.result_type(value))[index]
        model_trace = trace(seed(row_model.substituted(given), key_model)).get_trace(
            *row_model.args, **row_model.kwargs
        )
        z = {}
        for name in (*self.real, *self.discrete):
            value = jnp.asarray(model_trace[name]["value"])
            z[name] = row_model.sites[name].transform.inv(value) if name in self.real else value
        return row_model.to_rows(z)

    def over_rows(self, fn, keys=None):
        """Turn a function of one plate of rows into one of any number of points.

        :param fn: maps positions with rows leading (and a key) to arrays with rows leading.
        :param keys: a key for every plate of rows, if ``fn`` takes one.
        """
        num_rows = self.row_model.num_rows

        def mapped(position, num=None):
            num = len(next(iter(position.values()))) if num is None else num
            if num == num_rows and keys is None:  # as plain as the model, for who reads the jaxpr
                return fn(position)
            groups = -(-num // num_rows)

            def pad(x):
                x = jnp.concatenate(
                    [x, jnp.broadcast_to(x[:1], (groups * num_rows - num, *x.shape[1:]))]
                )
                return jnp.reshape(x, (groups, num_rows, *x.shape[1:]))

            position = jax.tree.map(pad, position)
            if keys is None:
                result = jax.vmap(fn)(position)
            else:
                result = jax.vmap(fn)(position, keys)
            return jax.tree.map(lambda x: jnp.reshape(x, (-1, *x.shape[2:]))[:num], result)

        return mapped


def read_target(rng_key, model, args, kwargs, *, unconditioned=True, is_shared=None):
    """Read a fixed model for its log Z.

    :param rng_key: random key.
    :param model: a model with fixed parameters.
    :param tuple args: its arguments.
    :param dict kwargs: its keyword arguments.
    :param bool released: whether observed sites are integrated over as well; else they stay, and
        every row has a log Z of its own.
    :param is_shared: whether all rows share their log Z; looked for if ``None``, which finds no
        difference between parameters that are traced.
    :return: a :class:`Target`.
    :raises ModelError: if the model has free parameters, or nothing to integrate over.
    """
    seen = read_model(model, args, kwargs, rng_key=rng_key)
    if seen.parameters or not seen.is_fixed:
        read_fixed_model(model, args, kwargs)  # raises, and says why
    if not unconditioned:
        return Target(read_fixed_model(model, args, kwargs), False, {})
    data = {
        name: x
        for name, x in seen.to_rows(seen.unconstrain_visible()).items()
        if not seen.visible[name].is_discrete
    }
    free = uncondition(model, seen.visible)
    row_model = read_fixed_model(free, args, kwargs)
    covariates = seen.covariates if seen.visible else _covariates(row_model, args, kwargs)
    if is_shared is None:
        is_shared = not covariates and not _rows_differ(row_model)
    if is_shared and row_model.num_rows > 1:
        row_model = _one_row(seen, free, args, kwargs) or row_model
    return Target(row_model, is_shared, data)


def _one_row(seen, free, args, kwargs):
    """The model on one row, if its rows come from nothing but the visible values; else None."""
    arrays, rebuild = provenance._labelled_arguments(args, kwargs)
    if not seen.arguments:
        return None
    first = {k: x[:1] if k in seen.arguments else x for k, x in arrays.items()}
    args, kwargs = rebuild(first)
    try:
        row_model = read_fixed_model(free, args, kwargs)
    except (ModelError, IndexError, TypeError, ValueError):
        return None  # it wants all its rows, which then are as many points at once
    return row_model if row_model.num_rows == 1 else None


def _covariates(row_model, args, kwargs):
    """Arguments with a value for every row that the density of unobserved sites reads."""
    arrays, rebuild = provenance._labelled_arguments(args, kwargs)
    values = {name: site.value for name, site in row_model.sites.items()}

    def run(**labelled):
        model_args, model_kwargs = rebuild(labelled)
        prepared = resolve_normalizer(row_model.substituted(values))
        return row_model.site_log_densities(trace(prepared).get_trace(*model_args, **model_kwargs))

    read_by = frozenset().union(*eval_provenance(run, **arrays).values())
    rows = row_model.num_rows, row_model.total_rows
    return sorted(label for label in read_by if arrays[label].shape[0] in rows)


def _rows_differ(row_model):
    """Whether rows have densities of their own, of which a closed-over array may be the reason."""
    if row_model.num_rows == 1:
        return False

    shapes = jax.eval_shape(lambda: row_model.to_rows(_unconstrained(row_model)))

    def densities(rng_key):
        rows = {}
        for key, (name, x) in zip(
            jax.random.split(rng_key, len(shapes)), sorted(shapes.items()), strict=True
        ):
            if name in row_model.visible:
                one = jax.random.normal(key, x.shape[1:], x.dtype)
            else:
                lowest, num_values = finite_values(row_model.sites[name], "log_normalizer")
                one = jax.random.randint(key, x.shape[1:], lowest, lowest + num_values, x.dtype)
            rows[name] = jnp.broadcast_to(one, x.shape)
        z = row_model.from_rows(rows)
        values, log_det = row_model.constrain({k: z[k] for k in row_model.visible})
        return row_model.log_density({}, {**z, **values}) + log_det

    with jax.ensure_compile_time_eval():  # numbers under `jit` too, if the model has no tracers
        values = jax.lax.map(densities, jax.random.split(jax.random.key(0), 4))
    if not not_jax_tracer(values):
        return False
    first = np.asarray(values)[:, :1]
    return bool(np.any(np.abs(np.asarray(values) - first) > 1e-3 * (1 + np.abs(first))))


def _unconstrained(row_model):
    """The placeholders of all sites, real ones in unconstrained coordinates."""
    return {
        name: site.transform.inv(site.value)
        if name in row_model.visible
        else jnp.asarray(site.value)
        for name, site in row_model.sites.items()
    }


def _is_proper(fn):
    improper = MaskedDistribution | ImproperUniform | Counting
    return not any(isinstance(x, improper) for x in layers(fn))


def _is_one(scale, plate_scale):
    scale = 1.0 if scale is None else scale / plate_scale
    return not_jax_tracer(scale) and bool(np.all(np.asarray(scale) == 1.0))
