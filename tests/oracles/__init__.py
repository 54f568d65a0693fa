# SPDX-License-Identifier: Apache-2.0
"""What the laws are held against: closed forms, quadrature and enumeration.

Nothing here calls the library, except for the models themselves, which are what a user writes. Each
density comes with its closed-form score and Hessian trace in *unconstrained* coordinates, row by
row, so that every objective can be written down from its formula.
"""

from oracles.estimates import *  # noqa: F403
from oracles.formulas import *  # noqa: F403
from oracles.lateral import *  # noqa: F403
from oracles.systems import *  # noqa: F403
