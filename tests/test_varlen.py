"""Packed sequences: each as if it were alone, in every feature, and no more work than their sizes ask for."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jflash
from jflash import _api, _mask, _plan, masks
from pallas_kernels import schedule
from tests.backends import BACKENDS, using

N, K, H, E = 4, 2, 6, 5
ENDS_Q, ENDS_K = np.array([0, 30, 30, 175, 190]), np.array([0, 40, 50, 50, 200])  # one without queries, one without keys
TOTAL_Q, TOTAL_K = 195, 204  # five and four tokens lie behind the last sequence
KEY = jax.random.key(0)


def draw(seed=0):
  rng = np.random.default_rng(seed)
  return tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((TOTAL_Q, N, H), (TOTAL_K, K, H), (TOTAL_K, K, E)))


def by_table(score, batch, head, query, key, table):
  return score + table[batch, head] * jnp.cos((query - 2 * key).astype(score.dtype))


SLOPES, TABLE = (np.random.default_rng(n).random((4, N)).astype("f") for n in (1, 2))
# name: (options of all, options of sequence n in a call of its own)
OPTIONS = {
    "nothing": ({}, lambda n: {}),
    "causal in a window": ({"is_causal": True, "local_window_size": (9, 3)}, lambda n: {"is_causal": True, "local_window_size": (9, 3)}),
    "a mask": ({"mask": masks.PrefixLM(3)}, lambda n: {"mask": masks.PrefixLM(3)}),
    "blocks": ({"mask": masks.BlockSparse(np.eye(20, 20, dtype=bool), (10, 10))},
               lambda n: {"mask": masks.BlockSparse(np.eye(20, 20, dtype=bool)[:-(-_lengths(n)[0] // 10), :-(-_lengths(n)[1] // 10)], 10)}),
    "slopes of sequences": ({"alibi_slopes": SLOPES}, lambda n: {"alibi_slopes": SLOPES[n]}),
    "score_mod, sinks and dropout": (
        {"score_mod": by_table, "score_operands": (TABLE,), "sinks": SLOPES[0], "dropout_rate": 0.3, "dropout_key": KEY},
        lambda n: {"score_mod": by_table, "score_operands": (TABLE,), "sinks": SLOPES[0], "dropout_rate": 0.3, "dropout_key": KEY,
                   "batch_ids": np.array([n])}),
}


def _lengths(n):
  return ENDS_Q[n + 1] - ENDS_Q[n], ENDS_K[n + 1] - ENDS_K[n]


def one_by_one(q, k, v, options):
  """Each sequence as a batch of its own, in the place of its tokens; nothing behind the last one."""
  out, lse = jnp.zeros((TOTAL_Q, N, E)), jnp.full((TOTAL_Q, N), -jnp.inf)
  sinks = options(0).get("sinks")
  if sinks is not None:
    lse = jnp.broadcast_to(jnp.asarray(sinks), lse.shape)
  for n in range(4):
    rows, columns = slice(ENDS_Q[n], ENDS_Q[n + 1]), slice(ENDS_K[n], ENDS_K[n + 1])
    if 0 not in _lengths(n):
      own = jflash.attention(q[None, rows], k[None, columns], v[None, columns], return_residual=True, implementation="xla", **options(n))
      out, lse = out.at[rows].set(own[0][0]), lse.at[rows].set(own[1][0])
  return out, lse


@pytest.mark.parametrize("traced", [False, True], ids=["known", "traced"])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_each_sequence_as_if_alone(backend, name, traced):
  if traced and (backend == "tpu" or name == "blocks"):
    pytest.skip("traced lengths take the same path for every option and backend; one of them is enough")
  options, own = OPTIONS[name]

  def packed(ends_q, ends_k):
    with using(backend, (16, 24) if backend == "xla" else None):
      f = lambda *x: jflash.attention_varlen(*x, ends_q, ends_k, implementation=backend, return_residual=True, **options)
      (out, lse), pull = jax.vjp(f, *draw())
      return out, lse, pull((jnp.cos(out), jnp.where(lse == -jnp.inf, 0, jnp.sin(lse))))

  got = jax.jit(packed)(ENDS_Q, ENDS_K) if traced else packed(ENDS_Q, ENDS_K)
  (out, lse), pull = jax.vjp(lambda *x: one_by_one(*x, own), *draw())
  want = out, lse, pull((jnp.cos(out), jnp.where(lse == -jnp.inf, 0, jnp.sin(lse))))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-5, rtol=3e-5), got, want)


def test_positions_may_be_given():
  """A suffix of each sequence attends to all of it, as in decoding."""
  q, k, v = draw()
  ends_q, ends_k = np.array([0, 3, 8]), np.array([0, 50, 204])
  last = np.concatenate([np.arange(47, 50), np.arange(149, 154)])
  got = jflash.attention_varlen(q[:8], k, v, ends_q, ends_k, is_causal=True, query_positions=last)
  whole = jflash.attention(q[None, 3:8], k[None, 50:], v[None, 50:], is_causal=True, query_positions=last[3:])
  np.testing.assert_allclose(got[3:], whole[0], atol=1e-5)


def test_what_no_sequence_holds_is_not_read():
  q, k, v = draw()
  f = lambda q, k, v: jflash.attention_varlen(q, k, v, ENDS_Q, ENDS_K)
  spoilt = q.at[190:].set(jnp.nan), *(x.at[200:].set(jnp.nan).at[40:50].set(jnp.nan) for x in (k, v))
  grads = [jax.grad(lambda *x: (f(*x) ** 2).sum(), (0, 1, 2))(*x) for x in ((q, k, v), spoilt)]
  np.testing.assert_array_equal(f(*spoilt), f(q, k, v))
  jax.tree.map(np.testing.assert_array_equal, *grads)


def test_work_grows_with_the_sum_of_squares():
  """16 sequences of 256 and one of 4096: the same tokens, a sixteenth of the tiles."""
  x = jnp.zeros((4096, 1, 8))

  def tiles(ends):
    ids = np.searchsorted(ends[1:], np.arange(4096), side="right")
    problem = _api.make_problem(x, x, x, query_segment_ids=ids, key_value_segment_ids=ids, batch_ids=_mask.OfTokens(ids, ids))
    visits = _plan.make_schedule(problem, _plan.Plan((128, 128), (1, 1), True, False))
    counts = [int((schedule.kind(side.codes) != schedule.EMPTY).sum()) for side in (visits.rows, visits.columns)]
    assert counts[0] == counts[1] and visits.rows.codes.shape[-1] == counts[0]
    return counts[0]

  assert tiles(np.arange(0, 4097, 256)) == 16 * 2 * 2
  assert tiles(np.array([0, 4096])) == 32 * 32
  assert tiles(np.arange(0, 4097, 128)) == 32


F = jnp.zeros
ERRORS = {
    "a batch": ((F((1, 5, 2, 4)), F((5, 2, 4)), F((5, 2, 4)), [0, 5], [0, 5]), {}, ValueError,
                r"`query` has 4 axes.*pass \[total, heads, width\].*or use jflash.attention"),
    "one end": ((F((5, 2, 4)),) * 3 + ([0], [0]), {}, ValueError, r"`cu_seqlens_q` has shape \(1,\); pass \[sequences \+ 1\]"),
    "two axes": ((F((5, 2, 4)),) * 3 + ([[0, 5]], [0, 5]), {}, ValueError, r"`cu_seqlens_q` has shape \(1, 2\)"),
    "floats": ((F((5, 2, 4)),) * 3 + (np.array([0.0, 5.0]), [0, 5]), {}, ValueError, "`cu_seqlens_q` has dtype float64; cast it to int32"),
    "not from 0": ((F((5, 2, 4)),) * 3 + ([1, 5], [0, 5]), {}, ValueError, r"`cu_seqlens_q` is \[1, 5\] and there are 5 tokens; it must begin"),
    "going back": ((F((5, 2, 4)),) * 3 + ([0, 4, 3], [0, 4, 5]), {}, ValueError, r"`cu_seqlens_q` is \[0, 4, 3\].*not decrease"),
    "past the end": ((F((5, 2, 4)),) * 3 + ([0, 5], [0, 6]), {}, ValueError, r"`cu_seqlens_k` is \[0, 6\] and there are 5 tokens.*end at 5"),
    "not as many": ((F((5, 2, 4)),) * 3 + ([0, 5], [0, 2, 5]), {}, ValueError,
                    r"`cu_seqlens_q` has shape \(2,\) and `cu_seqlens_k` has \(3,\); they must count the same sequences"),
    "lengths": ((F((5, 2, 4)),) * 3 + ([0, 5], [0, 5]), {"query_seq_lengths": [3]}, TypeError,
                "`query_seq_lengths` is an argument of attention, not of attention_varlen"),
    "an unknown option": ((F((5, 2, 4)),) * 3 + ([0, 5], [0, 5]), {"causal": True}, TypeError,
                          "attention_varlen has no argument `causal`; .* is_causal"),
    "slopes": ((F((5, 2, 4)),) * 3 + ([0, 5], [0, 5]), {"alibi_slopes": F((3, 2))}, ValueError, r"`alibi_slopes` has shape \(3, 2\)"),
    "lengths of keys and values": ((F((5, 2, 4)), F((5, 2, 4)), F((6, 2, 4)), [0, 5], [0, 5]), {}, ValueError, "`value` has length 6"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
  arrays, options, kind, message = ERRORS[name]
  with pytest.raises(kind, match=message):
    jflash.attention_varlen(*arrays, **options)
