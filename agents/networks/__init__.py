"""Block-wise networks: what they see of each block, and what they say of it.

Shapes, here and in its modules: B observations, 2L blocks, F features of a block, R entries of
the request, W = the width of a row that a network sees, H hidden units. The number of
parameters does not depend on L, unless each block is given a learned vector of its own.
"""

from __future__ import annotations
