# SPDX-License-Identifier: Apache-2.0
r"""Connected components of graphs that have their vertices and possible edges in common.

.. math:: f(\max(f_u, f_v)) ← \min(f_u, f_v) \text{ for every edge } (u, v), \qquad f ← f \circ f

until nothing changes: f is a forest over the vertices, trees are hooked to those they touch, and
paths to the roots are halved. It takes few rounds, whatever the length of the paths in the graph.

Reference: Shiloach, Vishkin, *An O(log n) parallel connectivity algorithm*, Journal of Algorithms
1982; Liu, Tarjan, *Simple concurrent labeling algorithms for connected components*, SOSA 2019.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

__all__ = ["connected_components"]


def connected_components(pairs: np.ndarray, active: jax.Array, num_vertices: int) -> jax.Array:
    """The components of many graphs at once.

    :param pairs: the edges that there may be, integers of shape (edges, 2).
    :param active: which of them there are, of shape (graphs, edges).
    :param int num_vertices: of each graph.
    :return: a vertex of the component of each vertex, the same one for all of it, of shape (graphs,
        vertices), counted through: the vertices of graph n start at ``n * num_vertices``.

    **Example**

    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> from numpyro_ebm.samplers.connected_components import connected_components
    >>> pairs = np.array([[0, 1], [1, 2]])
    >>> connected_components(pairs, jnp.array([[True, False], [True, True]]), 3).tolist()
    [[0, 0, 2], [3, 3, 3]]
    """
    num_graphs, size = len(active), len(active) * num_vertices
    starts = num_vertices * jnp.arange(num_graphs)[:, None]
    first, second = (jnp.ravel(starts + jnp.asarray(x)) for x in np.reshape(pairs, (-1, 2)).T)
    active = jnp.ravel(active)

    def hook(carry):
        roots, _ = carry
        ends = roots[first], roots[second]
        low = jnp.where(active, jnp.minimum(*ends), size)
        new = roots.at[jnp.maximum(*ends)].min(low)
        new = new[new]
        new = new[new]
        return new, jnp.any(new != roots)

    roots, _ = lax.while_loop(lambda carry: carry[1], hook, (jnp.arange(size), jnp.array(True)))
    return jnp.reshape(roots, (num_graphs, num_vertices))
