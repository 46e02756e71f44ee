"""jflash: exact, IO-aware attention for JAX on TPU, GPU and CPU."""

from . import block_sparse as block_sparse
from . import masks as masks
from ._api import attention as attention
from ._explain import Explanation as Explanation
from ._explain import explain as explain
from ._plan import interpret as interpret
from ._show import TileMap as TileMap
from ._show import show as show
from ._varlen import attention_varlen as attention_varlen
from .regression import RegressionStats as RegressionStats
from .regression import kernel_regression as kernel_regression
from .regression import log_density as log_density

__version__ = "0.1.0"
