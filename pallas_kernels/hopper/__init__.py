"""Attention on Mosaic GPU for Hopper (sm_90a), forward and backward, over the tiles that a schedule lists.

Needs JAX >= 0.11.2: older ones lack too much of Mosaic GPU.
"""

from . import wide as wide
from .columns import dkv as dkv
from .forward import forward as forward
from .fused import fused as fused
from .launch import Call as Call
from .launch import Residuals as Residuals
from .rows import dq as dq
from .tile_gradient import tile_gradient as tile_gradient
