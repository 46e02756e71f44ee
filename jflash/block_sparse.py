"""Block-sparse attention: the usual patterns of blocks, and a choice of blocks from the data.

A pattern is a `masks.BlockSparse` with a NumPy table: what it drops is known while tracing, is neither loaded nor computed, forward
and backward, and it combines with `&`, `|`, `~` like any mask. Blocks are squares of `block` positions. Query block i and key
block i hold the same positions, also where T and S differ; the last block of either may be shorter.

`jflash.show(mask, queries, keys, tiles=block)` draws a pattern and has its density as `1 - shown.skipped`; `jflash.explain` says
what `attention` makes of it. Blocks below 64 positions are computed in tiles of 64, with the mask.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import _check
from ._logits import Logits
from ._mask import Mask, Sizes, conjunction
from .masks import BlockSparse, Causal, Dense, RowLengths


def local_global(queries: int, keys: int, block: int, *, local: int, global_blocks: int = 0) -> BlockSparse:
  """A band of blocks, and blocks that see and are seen by all.

  Block (i, j) is kept where |i - j| <= local, or i < global_blocks, or j < global_blocks.

  Args:
    queries, keys: T and S.
    block: positions along a side of a block, at least 1.
    local: blocks to each side of the own one, at least 0.
    global_blocks: the first so many query blocks see all keys, and the first so many key blocks are seen by all queries.

  Returns:
    The mask. Under `Causal() &` it is a sliding window that always sees the first blocks too.

  Raises:
    ValueError: an argument is not an integer, or too small.

  Example:
    >>> import jflash
    >>> jflash.show(jflash.block_sparse.local_global(1280, 1280, 128, local=1, global_blocks=1), 1280, 1280)
    BlockSparse(table=bool[10,10], block_shape=(128, 128))
    1280 queries (down) by 1280 keys (across), tiles of 128 x 128
       0 ████████████████████
     128 ██████··············
     256 ████████············
     384 ██··██████··········
     512 ██····██████········
     640 ██······██████······
     768 ██········██████····
     896 ██··········██████··
    1024 ██············██████
    1152 ██··············████
    █ full, ▒ partial, · skipped
    56% of 100 tiles skipped, 0% need the mask, 44% are full

  Beltagy et al., Longformer, arXiv:2004.05150.
  """
  i, j = _numbers(queries, keys, block)
  for name, value in (("local", local), ("global_blocks", global_blocks)):
    _check.integer(value, name, 0)
  return BlockSparse((abs(i - j) <= local) | _global(i, j, global_blocks), (block, block))


def bigbird(queries: int, keys: int, block: int, *, local: int = 1, global_blocks: int = 1, random_blocks: int = 3,
            seed: int = 0) -> BlockSparse:
  """BigBird: a band of blocks, global blocks, and in each row of blocks some more, drawn at random.

  `local_global`, and in each row `random_blocks` of the blocks that this leaves out (or all of them, where there are not so many),
  drawn uniformly and without replacement. The same arguments give the same blocks.

  Args:
    queries, keys, block, local, global_blocks: as in `local_global`. BigBird's window of 3 blocks is local = 1.
    random_blocks: in each row, at least 0. They lie on both sides of the diagonal: under `Causal() &`, half of them on average
      see nothing.
    seed: of the draw, an integer of at least 0; take another one for each layer.

  Returns:
    The mask.

  Raises:
    ValueError: an argument is not an integer, or too small.

  Example:
    >>> import jflash
    >>> mask = jflash.masks.Causal() & jflash.block_sparse.bigbird(4096, 4096, 128)
    >>> jflash.show(mask, 4096, 4096).skipped
    0.8662109375

  Zaheer et al., Big Bird, arXiv:2007.14062.
  """
  _check.integer(random_blocks, "random_blocks", 0)
  _check.integer(seed, "seed", 0)
  table = local_global(queries, keys, block, local=local, global_blocks=global_blocks).table
  lots = np.where(table, np.inf, np.random.default_rng(seed).random(table.shape))
  rank = lots.argsort(axis=1).argsort(axis=1)
  return BlockSparse(table | (rank < random_blocks), (block, block))


def butterfly(queries: int, keys: int, block: int, *, max_stride: int | None = None, global_blocks: int = 0) -> BlockSparse:
  """Flat block butterfly: blocks whose numbers differ in at most one bit.

  Block (i, j) is kept where i = j, or i xor j is a power of two up to `max_stride`. In log₂ n layers, rounded up, each of n blocks
  hears from all. Where there are fewer blocks along one axis, the square pattern of that many is repeated along the other.

  Args:
    queries, keys: T and S.
    block: positions along a side of a block, at least 1.
    max_stride: the farthest that a block sees by one bit, in blocks, at least 1; None is no limit. Fewer bits keep fewer blocks.
    global_blocks: as in `local_global`; beside a butterfly it is the low-rank part of a pixelated butterfly.

  Returns:
    The mask.

  Raises:
    ValueError: an argument is not an integer, or too small.

  Example:
    >>> import jflash
    >>> jflash.show(jflash.block_sparse.butterfly(1024, 1024, 128), 1024, 1024)
    BlockSparse(table=bool[8,8], block_shape=(128, 128))
    1024 queries (down) by 1024 keys (across), tiles of 128 x 128
       0 ██████··██······
     128 ████··██··██····
     256 ██··████····██··
     384 ··██████······██
     512 ██······██████··
     640 ··██····████··██
     768 ····██··██··████
     896 ······██··██████
    █ full, ▒ partial, · skipped
    50% of 64 tiles skipped, 0% need the mask, 50% are full

  Dao et al., Pixelated Butterfly, arXiv:2112.00029; block-sparse FlashAttention: Dao et al., arXiv:2205.14135, section 3.3.
  """
  i, j = _numbers(queries, keys, block)
  _check.integer(global_blocks, "global_blocks", 0)
  if max_stride is not None:
    _check.integer(max_stride, "max_stride", 1)
  fewer = min(i.size, j.size)
  differ = (i % fewer) ^ (j % fewer)
  one_bit_or_none = differ & (differ - 1) == 0
  near = True if max_stride is None else differ <= max_stride
  return BlockSparse(one_bit_or_none & near | _global(i, j, global_blocks), (block, block))


def strided(queries: int, keys: int, block: int, *, local: int, stride: int) -> BlockSparse:
  """A band of blocks, and every stride-th block, counted from the own one.

  Block (i, j) is kept where |i - j| <= local, or i - j is a multiple of `stride`.

  Args:
    queries, keys: T and S.
    block: positions along a side of a block, at least 1.
    local: blocks to each side of the own one, at least 0.
    stride: in blocks, at least 1. With local >= stride - 1, two layers carry anything anywhere, and with a stride near the square
      root of the number of blocks they do so with the fewest blocks.

  Returns:
    The mask, which looks both ways; the source's is `Causal() &` this one.

  Raises:
    ValueError: an argument is not an integer, or too small.

  Example:
    >>> import jflash
    >>> mask = jflash.masks.Causal() & jflash.block_sparse.strided(1024, 1024, 128, local=1, stride=4)
    >>> jflash.show(mask, 1024, 1024)
    Causal() & BlockSparse(table=bool[8,8], block_shape=(128, 128))
    1024 queries (down) by 1024 keys (across), tiles of 128 x 128
       0 ▒▒··············
     128 ██▒▒············
     256 ··██▒▒··········
     384 ····██▒▒········
     512 ██····██▒▒······
     640 ··██····██▒▒····
     768 ····██····██▒▒··
     896 ······██····██▒▒
    █ full, ▒ partial, · skipped
    70.3% of 64 tiles skipped, 12.5% need the mask, 17.2% are full

  Child et al., Sparse Transformers, arXiv:1904.10509.
  """
  i, j = _numbers(queries, keys, block)
  _check.integer(local, "local", 0)
  _check.integer(stride, "stride", 1)
  return BlockSparse((abs(i - j) <= local) | ((i - j) % stride == 0), (block, block))


def top_k_blocks(query: Any, key: Any, k: int, block: int, *, mask: Any = None, is_causal: bool = False,
                 query_seq_lengths: Any = None, key_value_seq_lengths: Any = None, per_query_head: bool = False) -> Mask:
  """For each block of queries, the k blocks of keys with the greatest mean score.

  The score of block (i, j) is q̄ᵢ · k̄ⱼ, the product of the means over the blocks, which is the mean of the scores in it. It takes
  (T/block)·(S/block)·H multiplications a head and reads q and k once. It does not see one large score among many small ones, as a
  bound by least and greatest coordinates would (Quest), which then also keeps blocks that only might have one. The choice
  is made from q and k as `attention` gets them, so after rotary embeddings.

  Of the blocks that a row of blocks may see, exactly min(k, their number) are kept; where scores are equal, those of the lowest
  keys. The table is an ordinary input of the compiled program, different for each batch element and head. No gradient flows
  through the choice: those of `attention` are the gradients with the blocks held fixed.

  Args:
    query: `[B, T, N, H]` or `[T, N, H]`.
    key: `[B, S, K, H]` or `[S, K, H]`.
    k: blocks of keys for each block of queries, an integer of at least 1; from the number of blocks on, all of them.
    block: positions along a side of a block, at least 1.
    mask: what may be seen at all, a mask or a boolean array as `attention` takes it. Blocks in which it keeps nothing
      are not chosen. It is part of the mask that is returned, as are the following.
    is_causal: likewise for `masks.Causal()`; a block of queries also always takes its own block of keys, as one of the k.
    query_seq_lengths, key_value_seq_lengths: integers `[B]`; what lies beyond, whatever it holds, is in no mean and not seen.
    per_query_head: False: query heads that share a key head choose together, by the sum of their scores, of what any of them may
      see, and so load no more than k blocks. True: each for itself; as visits are shared, up to N/K times as many are made.

  Returns:
    The mask; for rows and columns that are numbered from 0, so not beside `query_positions` or `key_value_positions`.

  Raises:
    ValueError: shapes or dtypes do not fit, or `k` or `block` is not an integer of at least 1.

  Example:
    >>> import jax, jflash
    >>> q, k, v = (jax.random.normal(jax.random.key(n), (1, 1000, 4, 32)) for n in range(3))
    >>> mask = jflash.block_sparse.top_k_blocks(q, k, 3, 64, is_causal=True)
    >>> jflash.attention(q, k, v, mask=mask).shape
    (1, 1000, 4, 32)

  Block means: Lu et al., MoBA, arXiv:2502.13189; bounds: Tang et al., Quest, arXiv:2406.10774.
  """
  queries, keys = (jax.lax.stop_gradient(jnp.asarray(x)) for x in (query, key))
  _check.inputs(queries, keys, keys)
  _check.integer(k, "k", 1)
  _check.integer(block, "block", 1)
  queries, keys = (x[None] if x.ndim == 3 else x for x in (queries, keys))
  sizes = Sizes(queries.shape[0], queries.shape[2], queries.shape[1], keys.shape[1])
  lengths = [None if x is None else _check.per_batch(x, sizes, name) for x, name in (
      (query_seq_lengths, "query_seq_lengths"), (key_value_seq_lengths, "key_value_seq_lengths"))]
  terms = [] if mask is None else [mask if isinstance(mask, Mask) else Dense(_check.mask_array(mask, sizes))]
  terms += [Causal()] if is_causal else []
  terms += [RowLengths(*(x if x is None else x[:, 0, 0, 0] for x in lengths))] if any(x is not None for x in lengths) else []

  visible, _ = Logits(1.0, mask=conjunction([term.bind(sizes) for term in terms], None)).table(*sizes[2:4], (block, block))
  table = _choose(queries, keys, lengths, visible, k, block, is_causal, per_query_head)
  together = sizes.heads // keys.shape[2] if per_query_head else 1
  return conjunction([BlockSparse(table, (block, block), min(k * together, table.shape[-1])), *terms], None)


@functools.partial(jax.jit, static_argnums=(4, 5, 6, 7))
def _choose(queries: Any, keys: Any, lengths: Any, visible: Any, k: int, block: int, own_first: bool, per_query_head: bool) -> Any:
  """The table of `top_k_blocks`, `[B, N, query blocks, key blocks]`, from whether a block is visible, `[B|1, N|1, …]`."""
  batch, heads, kv_heads = queries.shape[0], queries.shape[2], keys.shape[2]
  means = _block_means(queries, block, lengths[0]).reshape(batch, -1, kv_heads, heads // kv_heads, queries.shape[3])
  scores = jnp.einsum("bikgh,bjkh->bkgij", means, _block_means(keys, block, lengths[1]), precision=jax.lax.Precision.HIGHEST)
  visible = jnp.broadcast_to(visible, (batch, heads, *scores.shape[3:])).reshape(scores.shape)
  shape = scores.shape
  if not per_query_head:
    scores, visible = scores.sum(2, keepdims=True), visible.any(2, keepdims=True)
  chosen = jnp.broadcast_to(_largest(scores, visible, k, own_first), shape)
  return chosen.reshape(batch, heads, *shape[3:])


def _largest(scores: Any, visible: Any, k: int, own_first: bool) -> Any:
  """True at the k largest of the visible scores of each row; equal ones in order, what is no number last."""
  least = jnp.finfo(scores.dtype).min
  scores = jnp.where(visible, jnp.nan_to_num(scores, nan=least, neginf=least), -jnp.inf)
  if own_first:
    scores = jnp.where(jnp.eye(*scores.shape[-2:], dtype=bool) & visible, jnp.inf, scores)
  _, columns = jax.lax.top_k(scores, min(k, scores.shape[-1]))
  return jnp.put_along_axis(jnp.zeros(scores.shape, bool), columns, True, axis=-1, inplace=False) & visible


def _block_means(x: Any, block: int, lengths: Any) -> Any:
  """The mean of `[B, T, N, H]` over each block of T, `[B, blocks, N, H]` in at least float32; 0 where a block is empty."""
  count = -(-x.shape[1] // block)
  row = np.arange(count * block).reshape(1, -1, 1, 1)
  inside = row < (x.shape[1] if lengths is None else jnp.minimum(lengths, x.shape[1]))
  x = jnp.pad(x.astype(jnp.promote_types(x.dtype, jnp.float32)), ((0, 0), (0, count * block - x.shape[1]), (0, 0), (0, 0)))
  total = jnp.where(inside, x, 0).reshape(x.shape[0], count, block, *x.shape[2:]).sum(2)
  number = jnp.maximum(inside.reshape(-1, count, block, 1, 1).sum(2), 1)
  return total / number.astype(x.dtype)


def _numbers(queries: int, keys: int, block: int) -> tuple[np.ndarray, np.ndarray]:
  """The numbers of the query blocks, as a column, and of the key blocks, as a row."""
  for name, value in (("queries", queries), ("keys", keys), ("block", block)):
    _check.integer(value, name, 1)
  return np.arange(-(-queries // block))[:, None], np.arange(-(-keys // block))[None, :]


def _global(i: np.ndarray, j: np.ndarray, count: int) -> np.ndarray:
  return (i < count) | (j < count)


__all__ = ["local_global", "bigbird", "butterfly", "strided", "top_k_blocks"]
