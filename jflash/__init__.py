"""jflash: exact, IO-aware attention for JAX on TPU, GPU and CPU."""

from ._api import attention as attention

__version__ = "0.1.0"
