"""`jflash.attention` is a superset of `jax.nn.dot_product_attention`: drawn at random, and by signature.

The one intended difference: a row that sees nothing is the mean of all values there, and 0 here.
"""

from __future__ import annotations

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jflash


@st.composite
def arguments(draw):
  """(arrays that get a gradient, other keywords, keep [B, N, T, S])."""
  pick = lambda *options: draw(st.sampled_from(options))
  b, (n, k) = pick(1, 2), pick((1, 1), (4, 2), (3, 1), (3, 3))
  t, s, h = pick(1, 7, 20), pick(1, 13, 20), pick(1, 8)
  rng = np.random.default_rng(draw(st.integers(0, 2**32)))
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  arrays = {"query": normal(b, t, n, h), "key": normal(b, s, k, h), "value": normal(b, s, k, h)}
  kwargs, keep = {}, np.ones((b, n, t, s), bool)
  i, j = np.arange(t)[:, None], np.arange(s)[None, :]
  broadcast = lambda: tuple(size if draw(st.booleans()) else 1 for size in (b, n, t, s))
  if draw(st.booleans()):
    arrays["bias"] = normal(*broadcast())
  if draw(st.booleans()):
    kwargs["mask"] = rng.random(broadcast()) < 0.7
    keep &= kwargs["mask"]
  if draw(st.booleans()):
    kwargs["is_causal"] = True
    keep &= i >= j
  if draw(st.booleans()):
    kwargs["query_seq_lengths"] = rng.integers(1, t + 1, b).astype(np.int32)
    keep &= i < kwargs["query_seq_lengths"][:, None, None, None]
  if draw(st.booleans()):
    kwargs["key_value_seq_lengths"] = rng.integers(1, s + 1, b).astype(np.int32)
    keep &= j < kwargs["key_value_seq_lengths"][:, None, None, None]
  if draw(st.booleans()):
    window = kwargs["local_window_size"] = pick(0, 3, (2, 0), (0, 5), (4, 1))
    left, right = (window, window) if isinstance(window, int) else window
    keep &= (j >= i - left) & (j <= i + right)
  if draw(st.booleans()):
    kwargs["scale"] = pick(0.5, 1.0)
  return arrays, kwargs, keep


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(arguments(), st.booleans())
def test_values_and_gradients_are_those_of_jax(drawn, residual):
  arrays, kwargs, keep = drawn
  seen = keep.any(-1).transpose(0, 2, 1)  # [B, T, N]

  def run(function, **more):
    def loss(arrays):
      result = function(**arrays, **kwargs, return_residual=residual, **more)
      out = result[0] if residual else result  # the lse of jax.nn has no gradient
      return jnp.sum(jnp.sin(jnp.where(seen[..., None], out, 0))), result
    (_, result), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)
    return result, grads

  ours, our_grads = run(jflash.attention, implementation="xla")
  theirs, their_grads = run(jax.nn.dot_product_attention)
  if residual:
    (ours, our_lse), (theirs, their_lse) = ours, theirs
    assert our_lse.shape == their_lse.shape and our_lse.dtype == their_lse.dtype
    np.testing.assert_allclose(our_lse[seen], their_lse[seen], rtol=2e-5, atol=2e-5)
    assert (our_lse[~seen] == -np.inf).all()
  assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
  np.testing.assert_allclose(ours[seen], theirs[seen], rtol=2e-5, atol=2e-5)
  assert not np.asarray(ours)[~seen].any()
  assert not np.asarray(our_grads["query"])[~seen].any()
  for name in arrays:
    np.testing.assert_allclose(our_grads[name], their_grads[name], rtol=1e-4, atol=5e-5, err_msg=name)


def test_unbatched_as_in_jax():
  rng = np.random.default_rng(0)
  q, k, v = (rng.normal(size=shape).astype("f") for shape in ((7, 4, 8), (9, 2, 8), (9, 2, 8)))
  ours, our_lse = jflash.attention(q, k, v, is_causal=True, return_residual=True)
  theirs, their_lse = jax.nn.dot_product_attention(q, k, v, is_causal=True, return_residual=True)
  assert ours.shape == theirs.shape and our_lse.shape == their_lse.shape
  np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-5)
  np.testing.assert_allclose(our_lse, their_lse, rtol=2e-5, atol=2e-5)


def test_the_signature_is_a_superset():
  ours, theirs = (list(inspect.signature(f).parameters.values()) for f in (jflash.attention, jax.nn.dot_product_attention))
  for mine, other in zip(ours, theirs):
    assert (mine.name, mine.kind, mine.default) == (other.name, other.kind, other.default)
  assert len(ours) > len(theirs)
  assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in ours[len(theirs):]), "what is ours alone is optional"
