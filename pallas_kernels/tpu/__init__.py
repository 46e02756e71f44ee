"""Attention on Mosaic TPU, forward and backward, over the tiles that a schedule lists."""

from .backward import backward as backward
from .backward import leaf_gradient as leaf_gradient
from .forward import forward as forward
from .launch import Call as Call
