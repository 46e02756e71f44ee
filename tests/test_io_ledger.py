"""The IO ledger counts what the kernels' pipeline moves: by hand, by brute force, and as the theorems say."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

import jflash
from benchmarks import io_counts, io_ledger, jaxprs, ledger, standard
from benchmarks.io_counts import Shape
from jflash import _plan, masks
from pallas_kernels import schedule

SHAPE = Shape(batch=2, length=512, heads=2, width=64)
ROWS, COLUMNS = TILES = 128, 256
HEADS = SHAPE.batch * SHAPE.heads
ARRAY = HEADS * SHAPE.length * SHAPE.width * 2  # bytes of q, and of each array like it
STATISTIC = HEADS * SHAPE.length * 4  # of lse, and of δ


def _count(tiles=TILES, shape=SHAPE, **mask):
  found = io_counts.count(shape, tiles, **mask)
  return {kernel.name: kernel for kernel in found.kernels}, found


def test_dense_attention_by_hand():
  kernels, found = _count()
  re_read = SHAPE.length // ROWS  # keys and values come once for each of 4 tiles of queries
  visits = 4 * 4 * 2  # bytes of a list
  assert kernels["jflash_forward"].bytes == (2 + 2 * re_read) * ARRAY + STATISTIC + visits
  assert kernels["jflash_dq"].bytes == (3 + 2 * re_read) * ARRAY + 2 * STATISTIC + visits
  # Queries, dout and their statistics come once for each of 2 tiles of keys.
  assert kernels["jflash_dkv"].bytes == (4 + 2 * 2) * ARRAY + 2 * 2 * STATISTIC + visits
  assert found.kernel_bytes == sum(kernel.bytes for kernel in kernels.values())


def test_causal_attention_by_hand():
  kernels, _ = _count((128, 128), is_causal=True)
  # Of 4 x 4 tiles, 1 + 2 + 3 + 4 are visited. Each row of tiles begins with key tile 0, which is there after row 0.
  tile = ARRAY // 4
  assert kernels["jflash_forward"].bytes == 2 * ARRAY + 2 * 9 * tile + STATISTIC + 10 * 4
  # Each column ends with query tile 3, and the next one begins with another; the last column is tile 3 alone.
  assert kernels["jflash_dkv"].bytes == 4 * ARRAY + 2 * 9 * tile + 2 * 9 * STATISTIC // 4 + 10 * 4


def test_block_sparse_attention_by_hand():
  table = np.array([[1, 0, 1, 0], [0, 0, 1, 1], [0, 0, 0, 0], [1, 1, 0, 0]], bool)
  kernels, _ = _count((128, 128), mask=masks.BlockSparse(table, (128, 128)))
  # Key tiles 0 2 | 2 3 | 0 (empty, yet loaded) | 0 1: two of seven visits find their tile where it is.
  tile, blocks = ARRAY // 4, 4 * 4 * 4  # the table itself is loaded once
  assert kernels["jflash_forward"].bytes == 2 * ARRAY + 2 * 5 * tile + STATISTIC + 7 * 4 + blocks


def test_heads_that_share_keys_are_counted_as_the_grid_goes():
  q, kv = (jax.ShapeDtypeStruct((1, 256, heads, 64), jnp.bfloat16) for heads in (4, 2))
  with jflash.interpret(), _plan.force_tiles(128, 256):
    found, = ledger.ledger(lambda *x: jflash.attention(*x, implementation="tpu"), q, kv, kv).kernels
  # With one tile of keys, it stays for both tiles of queries of both heads.
  assert [operand.moves for operand in found.reads] == [1, 8, 2, 2]


@pytest.mark.parametrize("mask", [None, masks.Causal(), masks.Window(100, 40),
                                  masks.BlockSparse(np.random.default_rng(0).random((2, 2, 4, 4)) < 0.4, (128, 128))])
@pytest.mark.parametrize("length", [512, 450])
def test_a_walk_along_the_visits_finds_the_same(mask, length):
  """Step by step in Python, from the schedule and what the kernels' documentation says that they load."""
  shape = dataclasses.replace(SHAPE, length=length)
  kernels, _ = _count(shape=shape, mask=mask)
  array = shape.array
  with jflash.interpret(), _plan.force_tiles(*TILES), _plan.force_passes(1, 0):
    problem = jflash._api.make_problem(*[jnp.zeros(array.shape, array.dtype)] * 3, None, mask, **_defaults())
    visits = _plan.make_schedule(problem, _plan.plan_tpu(problem))
  query, key, statistic = (shape.width * 2, ROWS), (shape.width * 2, COLUMNS), (4, ROWS)  # bytes of a row, rows of a block
  outer, inner = schedule.outer, schedule.inner
  wanted = {
    "jflash_forward": (visits.rows, [(query, outer), (key, inner), (key, inner), (query, outer), (statistic, outer)]),
    "jflash_dq": (visits.rows, [(query, outer), (key, inner), (key, inner), (query, outer), (statistic, outer), (statistic, outer),
                                (query, outer)]),
    "jflash_dkv": (visits.columns, [(query, inner), (key, outer), (key, outer), (query, inner), (statistic, inner),
                                    (statistic, inner), (key, outer), (key, outer)]),
  }
  for name, (lists, operands) in wanted.items():
    moved, here = [0] * len(operands), [None] * len(operands)
    for b, h in itertools.product(range(shape.batch), range(shape.heads)):
      codes = lists.codes[b % lists.codes.shape[0], h % lists.codes.shape[1]]
      for code in codes:
        for n, ((size, side), tile) in enumerate(operands):
          block = b, h, tile(code)
          if block != here[n]:
            moved[n] += size * min(side, length - block[2] * side)
            here[n] = block
    found = [operand.bytes for operand in (*kernels[name].reads, *kernels[name].writes)]
    assert found[0] == lists.codes.size * 4
    assert found[-len(moved):] == moved, name  # before them, the arrays of the mask


def _defaults():
  return {"scale": None, "is_causal": False, **dict.fromkeys((
    "query_seq_lengths", "key_value_seq_lengths", "local_window_size", "query_positions", "key_value_positions",
    "query_segment_ids", "key_value_segment_ids", "logits_soft_cap", "alibi_slopes"))}


def test_long_grids_are_counted_in_chunks(monkeypatch):
  _, whole = _count(is_causal=True)
  monkeypatch.setattr(ledger, "CHUNK", 5)
  assert _count(is_causal=True)[1] == whole


def test_the_count_follows_the_tiles_of_the_kernels():
  shape = dataclasses.replace(SHAPE, batch=1, heads=1)
  for rows, columns in itertools.product((128, 256), (128, 512)):
    kernels, _ = _count((rows, columns), shape)
    keys, queries = kernels["jflash_forward"].reads[2], kernels["jflash_dkv"].reads[1]
    assert (keys.times, queries.times) == (512 / rows if columns < 512 else 1, 512 / columns if rows < 512 else 1)
    assert keys.block == (columns, 64) and queries.block == (rows, 64)


def test_memory_on_chip_is_that_of_blocks_and_scratch():
  kernels, found = _count()
  q, k, statistic = ROWS * 64 * 2, COLUMNS * 64 * 2, ROWS * 4
  assert kernels["jflash_forward"].on_chip == 2 * q + 2 * k + statistic + 2 * ROWS * 128 * 4 + ROWS * 64 * 4 + 4  # a flag
  assert kernels["jflash_dq"].on_chip == 3 * q + 2 * k + 2 * statistic + ROWS * 64 * 4
  assert kernels["jflash_dkv"].on_chip == 2 * q + 4 * k + 2 * statistic + 2 * COLUMNS * 64 * 4
  assert found.on_chip == max(kernel.on_chip for kernel in kernels.values())


def test_rows_shorter_than_128_take_128_in_a_chips_memory():
  kernels, _ = _count()
  for operand in kernels["jflash_dq"].reads[1:]:
    assert operand.lane_bytes == operand.bytes * (2 if operand.shape[-1] == 64 else 1)


def test_any_kernel_is_counted():
  def double(x_ref, out_ref):
    out_ref[...] = 2 * x_ref[...]

  def call(x):
    return pl.pallas_call(double, name="double", grid=(3, 4), out_shape=jax.ShapeDtypeStruct((24, 512), jnp.float32),
                          in_specs=[pl.BlockSpec((8, 128), lambda i, j: (i // 2, 0))],
                          out_specs=pl.BlockSpec((8, 128), lambda i, j: (i, j)))(x + 1)

  found = ledger.ledger(call, jax.ShapeDtypeStruct((16, 100), jnp.float32))
  kernel, = found.kernels
  assert (kernel.name, kernel.grid, kernel.on_chip) == ("double", (3, 4), 2 * 8 * 128 * 4)
  # Blocks 0 and 1, of which 100 columns are inside; then every block of the output once.
  assert [(x.moves, x.bytes) for x in (*kernel.reads, *kernel.writes)] == [(2, 2 * 8 * 100 * 4), (12, 24 * 512 * 4)]
  assert found.around_bytes == 2 * 16 * 100 * 4


def test_what_is_around_the_kernels_is_counted_once():
  _, found = _count()
  transposes = [p for p in found.around if p.name == "transpose"]
  assert len(transposes) == 6 and {p.bytes for p in transposes} == {2 * ARRAY}  # q, k, v; dq, dk, dv
  rest, = (p for p in found.around if p not in transposes)
  assert [x.shape[-1] for x in rest.reads].count(64) == 2  # out, dout; then out and dout are written
  assert rest.bytes == 4 * ARRAY + 3 * STATISTIC and "reduce_sum" in rest.name


def test_equal_operations_are_one_and_unused_ones_none():
  def function(x):
    unused = jnp.exp(x)
    return jax.jit(jnp.sin)(x) + jnp.sin(x), unused[:0]

  operations = jaxprs.trace(function, jax.ShapeDtypeStruct((8,), jnp.float32)).operations
  assert [op.name for op in operations if op.name in ("sin", "add")] == ["sin", "add"]


def test_lists_that_are_not_known_are_refused():
  q = jax.ShapeDtypeStruct((1, 256, 1, 64), jnp.bfloat16)
  ids = jax.ShapeDtypeStruct((1, 256), jnp.int32)

  def attend(q, ids):
    return jflash.attention(q, q, q, mask=masks.Segments(ids), implementation="tpu")

  with jflash.interpret(), pytest.raises(ValueError, match="what kernel 'jflash_forward' prefetches depends on the arguments"):
    ledger.ledger(attend, q, ids)


def test_kernels_in_loops_are_refused():
  q = jax.ShapeDtypeStruct((1, 128, 1, 64), jnp.bfloat16)

  def layers(q):
    return jax.lax.scan(lambda x, _: (jflash.attention(x, x, x, implementation="tpu"), None), q, length=3)[0]

  with jflash.interpret(), pytest.raises(ValueError, match="a kernel inside of `scan`"):
    ledger.ledger(layers, q)


@pytest.fixture(scope="module")
def points():
  return io_counts.sweep([8192], [128, 256], [64, 128]) + io_counts.sweep([16384], [128], [64])


def test_bytes_go_with_n_squared_d_squared_over_m(points):
  for name in ("jflash_dq", "jflash_dkv", io_counts.ALL):
    found = io_counts.fit([p for p in points if p.kernel == name])
    assert (found.length, found.width, found.on_chip) == pytest.approx((2, 2, -1), abs=0.05), name
    assert found.r2 > 0.999
  forward = io_counts.fit([p for p in points if p.kernel == "jflash_forward"])
  assert forward.length == pytest.approx(2, abs=0.05) and forward.on_chip == pytest.approx(-1, abs=0.05)
  assert 1.5 < forward.width < 2  # its row statistics take 1 KiB a row whatever d is


def test_a_fit_finds_the_exponents_of_a_power_law():
  points = [io_counts.Point("", n, d, 0, m, round(1e6 * n**2 * d**1.5 / m))
            for n, d, m in itertools.product((64, 128, 256), repeat=3)]
  found = io_counts.fit(points)
  assert (found.length, found.width, found.on_chip, found.r2) == pytest.approx((2, 1.5, -1, 1), abs=1e-4)


def test_bytes_go_with_the_density_of_a_block_sparse_mask():
  densities = [0, 1 / 8, 3 / 8, 5 / 8, 1]
  rows = io_counts.block_sparse(2048, 64, densities)
  slope, intercept, r2 = io_counts.line(rows[1:])
  assert r2 > 0.99 and [row.density for row in rows] == densities
  assert intercept == pytest.approx(rows[0].kernel_bytes, rel=0.2)
  assert slope + intercept == pytest.approx(rows[-1].kernel_bytes, rel=0.02)
  assert rows[1].kernel_bytes < rows[-1].kernel_bytes / 4


def test_a_window_costs_what_it_sees():
  """Steps and bytes go with N times the window, whatever N², forward and backward, with one span of dQ (N <= 28,672) and with more."""
  found = {(n, w): io_counts.walked(n, w) for n, w in ((8192, 1024), (16384, 1024), (32768, 1024), (65536, 1024), (32768, 4096))}
  for now, twice in (((8192, 1024), (16384, 1024)), ((32768, 1024), (65536, 1024))):
    for a, b in zip(found[now], found[twice]):
      assert b.steps == pytest.approx(2 * a.steps, rel=0.05) and b.bytes == pytest.approx(2 * a.bytes, rel=0.05)
  for narrow, wide in zip(found[32768, 1024], found[32768, 4096]):
    assert 2 < wide.steps / narrow.steps < 4 and wide.bytes > narrow.bytes  # 3 and 9 tiles of 512 in a row, some in pairs
  forward, backward = found[32768, 1024]
  assert forward.steps == 2 * 64 - 2  # pairs of visits: 2 for 3 tiles, and 1 in the first two rows
  assert backward.steps == 3 * 64 - 3  # of two spans together, one visit a step
  for x, dense in zip(found[65536, 1024], io_counts.walked(65536, None)):
    assert dense.bytes > 7 * x.bytes


def test_lists_of_long_sequences_fit_into_scalar_memory():
  for x in io_counts.walked(131072, None):
    assert x.list_bytes <= 4 * _plan.MOST_VISITS and x.list_bytes >= 4 * 256 * 257 // 2


def test_standard_attention_is_what_the_algorithms_say():
  square, array = 64 * 16 * 1024**2 * 2, 64 * 16 * 1024 * 64 * 2
  setting = dataclasses.astuple(io_counts.PAPER)
  assert standard.total(standard.BARE, *setting) == 11 * square + 12 * array
  # One byte for each choice of dropout, and a mask for all heads.
  assert standard.total(standard.UNFUSED, *setting) == 20 * square + 12 * array + 2 * 1024**2
  assert sum(step.squares for step in standard.UNFUSED) == 19


def test_the_best_tiles_fit_and_no_others_that_fit_move_less():
  shape, sides = Shape(1, 256, 1, 64), (128, 256)
  limit = 400 * 2**10
  best = io_counts.best_tiles(shape, limit, sides)
  found = {tiles: io_counts.count(shape, tiles) for tiles in itertools.product(sides, sides)}
  assert found[best].on_chip <= limit
  assert all(x.on_chip > limit or x.kernel_bytes >= found[best].kernel_bytes for x in found.values())
  assert any(x.on_chip > limit for x in found.values())


def test_the_page_and_the_plot_are_written(tmp_path):
  pytest.importorskip("matplotlib")
  out = tmp_path / "ledger"
  argv = ("--lengths 512 --short 256 --widths 64 --sides 128,256 --setting 1,64,1,64 --sparse-length 512 --densities 2 "
          f"--window-lengths 2048 --out {out}").split()
  assert io_ledger.main(argv) == 0
  page = out.with_suffix(".md").read_text()
  bare = standard.total(standard.BARE, 1, 64, 1, 64) / 1e9
  assert "| 512 | all kernels |" in page and f"| **all** |  |  | 11 | {bare:.3f} |" in page
  assert "| forward | 1024 | 2048 |" in page and "| backward | causal | 2048 |" in page
  assert page.count("| **jflash_dkv** | grid 1 x 1 x") == 2 and "R² = " in page and "Not measured" not in page
  assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
