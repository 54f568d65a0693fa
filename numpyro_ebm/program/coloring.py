# SPDX-License-Identifier: Apache-2.0
"""A colouring of the graph of interactions: coordinates of one colour can be drawn at once.

Reference: Brélaz, *New methods to color the vertices of a graph*, Communications of the ACM, 1979.
"""

from typing import Any

import numpy as np

__all__ = ["greedy_colors"]


def greedy_colors(graph: Any) -> np.ndarray:
    """A proper colouring of a graph with few colours: two for every bipartite one.

    :param graph: symmetric sparse matrix of shape (n, n).
    :return: NumPy array of n colours, 0, 1, ...; neighbours differ.

    **Example**

    >>> import numpy as np
    >>> from scipy.sparse import csr_matrix
    >>> from numpyro_ebm.program.coloring import greedy_colors
    >>> greedy_colors(csr_matrix([[0, 1, 0], [1, 0, 1], [0, 1, 0]])).tolist()
    [1, 0, 1]
    """
    size = graph.shape[0]
    neighbours = np.split(graph.indices, graph.indptr[1:-1])
    degrees = np.diff(graph.indptr)
    colors = np.full(size, -1)
    seen = [set() for _ in range(size)]  # colours of the neighbours
    # Most colours around it first, then most neighbours (DSATUR).
    priority = degrees / (degrees.max(initial=0) + 1.0)
    for _ in range(size):
        i = int(np.argmax(priority))
        color = 0
        while color in seen[i]:
            color += 1
        colors[i], priority[i] = color, -np.inf
        for j in neighbours[i]:
            if color not in seen[j]:
                seen[j].add(color)
                priority[j] += 1.0
    return colors
