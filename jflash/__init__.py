"""jflash: exact, IO-aware attention for JAX on TPU, GPU and CPU."""

from . import masks as masks
from ._api import attention as attention
from ._plan import interpret as interpret

__version__ = "0.1.0"
