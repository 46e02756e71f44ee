"""The backends that every test about attention's answer walks, and the tiles that they are tested with: the only such list.

Tiles are small and odd where a backend allows it, so that the sizes of `cases` make several of them, with ragged ends.
"""

from __future__ import annotations

import contextlib

import jax

import jflash
from jflash import _plan

TILES = {"xla": (48, 80), "tpu": (128, 128), "mosaic_gpu": (64, 64)}  # query rows, key columns; kernels want multiples of 128
BACKENDS = ["xla", "tpu"]  # "mosaic_gpu" has tests of its own, test_gpu_*.py: its interpreter is slow, and needs a newer JAX


@contextlib.contextmanager
def using(backend: str, tiles: tuple[int, int] | None = None):
  """What is traced inside takes the tiles of `backend`, and its kernels are interpreted."""
  with _plan.force_tiles(*(tiles or TILES[backend])), contextlib.ExitStack() as stack:
    if backend != "xla":
      stack.enter_context(jflash.interpret())
    if backend == "mosaic_gpu":
      stack.enter_context(jax.default_matmul_precision("highest"))
    yield


def attention(backend: str, *args, **kwargs):
  """`jflash.attention` by that backend, on its test tiles, with `lse`."""
  with using(backend):
    return jflash.attention(*args, **kwargs, implementation=backend, return_residual=True)
