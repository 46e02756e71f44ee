"""Every error that a caller can meet: it names the argument, both sides, and the fix."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jflash
from jflash import masks

Q, K, V = np.zeros((2, 6, 8, 4), "f"), np.zeros((2, 10, 2, 4), "f"), np.zeros((2, 10, 2, 5), "f")
B, T, N, S = 2, 6, 8, 10


def qkv(query=Q, key=K, value=V, **kwargs):
  return {"query": query, "key": key, "value": value, **kwargs}


def f(*shape):
  return np.zeros(shape, "f")


def ints(*shape):
  return np.zeros(shape, np.int32)


def add_whole(score, batch, head, query, key, operand):
  return score + operand


def add_slopes(score, batch, head, query, key, slopes):
  return score + slopes[head]


KEY = jax.random.key(0)
BTNH = r"\[B, T, N, H\]"
ERRORS = {
    # query, key, value
    "two axes": (qkv(f(6, 4)), ValueError, rf"`query` has 2 axes and shape \(6, 4\); pass {BTNH} or, unbatched, \[T, N, H\]"),
    "five axes": (qkv(f(1, 2, 6, 8, 4)), ValueError, rf"`query` has 5 axes.*pass {BTNH}"),
    "key without batch": (qkv(key=K[0]), ValueError, "`key` has 3 axes and `query` has 4; pass both with, or both without"),
    "value without batch": (qkv(value=V[0]), ValueError, "`value` has 3 axes and `query` has 4; pass both"),
    "nothing to see": (qkv(key=f(2, 0, 2, 4)), ValueError, r"`key` has shape \(2, 0, 2, 4\); every size must be at least 1"),
    "integers": (qkv(query=ints(2, 6, 8, 4)), ValueError, "`query` has dtype int32; cast it to one of bfloat16, float16, float32"),
    "integer values": (qkv(value=ints(2, 10, 2, 5)), ValueError, "`value` has dtype int32; cast it"),
    "complex": (qkv(query=Q.astype("complex64")), ValueError, "`query` has dtype complex64; cast it"),
    "mixed dtypes": (qkv(key=K.astype("float16")), ValueError,
                     "`key` has dtype float16 and `query` has float32; cast them to one dtype"),
    "mixed value": (qkv(value=jnp.zeros(V.shape, jnp.bfloat16)), ValueError, "`value` has dtype bfloat16 and `query` has float32"),
    "key batch": (qkv(key=f(3, 10, 2, 4)), ValueError, "`key` has batch size 3 and `query` has batch size 2; they must be equal"),
    "value batch": (qkv(value=f(1, 10, 2, 5)), ValueError, "`value` has batch size 1 and `query` has batch size 2"),
    "value length": (qkv(value=f(2, 11, 2, 5)), ValueError, "`value` has length 11 and `key` has length 10; they must be equal"),
    "value heads": (qkv(value=f(2, 10, 1, 5)), ValueError, "`value` has number of heads 1 and `key` has number of heads 2"),
    "width": (qkv(key=f(2, 10, 2, 3)), ValueError, "`key` has head width 3 and `query` has head width 4; they must be equal"),
    "heads": (qkv(key=f(2, 10, 6, 4), value=f(2, 10, 6, 4)), ValueError,
              "`key` has 6 heads and `query` has 8; query heads must be a multiple of key heads"),
    "heads before the sequence": (qkv(f(2, 8, 6, 4), f(2, 8, 10, 4), f(2, 8, 10, 4)), ValueError,
                                  rf"`key` has 10 heads and `query` has 6.*{BTNH}: heads come after the sequence"),
    # functions of scores
    "a score_mod that is none": (qkv(score_mod=3), TypeError, "`score_mod` is 3; pass a function of"),
    "operands without a function": (qkv(score_operands=(f(8),)), ValueError, "`score_operands` has 1 arrays and `score_mod` is None"),
    "operands not in a tuple": (qkv(score_mod=add_slopes, score_operands=f(8)), TypeError,
                                r"`score_operands` is ndarray; pass a tuple of arrays, \(array,\)"),
    "an operand that does not broadcast": (qkv(score_mod=add_whole, score_operands=(f(8),)), ValueError,
                                           r"`score_mod` add_whole fails on a tile of scores .* and operands of shape \(8,\): "
                                           r".*Operands come whole.*slopes\[head\]"),
    "an operand too many": (qkv(score_mod=add_slopes, score_operands=(f(8), f(8))), TypeError,
                            r"`score_mod` add_slopes fails.*operands of shape \(8,\), \(8,\): .*positional argument"),
    "an if": (qkv(score_mod=lambda s, b, h, q, k: s if q > k else -s), ValueError,
              "`score_mod` <lambda> fails on a tile.*write `if` as jnp.where"),
    "another shape": (qkv(score_mod=lambda s, b, h, q, k: s.sum(-1)), ValueError, "returns shape .* it must return one value for each"),
    "a shape that broadcasts": (qkv(score_mod=lambda s, b, h, q, k: h * 1.0), ValueError, "returns shape .* it must return one value"),
    "another dtype": (qkv(score_mod=lambda s, b, h, q, k: s.astype("bfloat16")), ValueError,
                      r"`score_mod` <lambda> returns bfloat16 and scores are float32; .*astype\(score.dtype\)"),
    "integers for scores": (qkv(score_mod=lambda s, b, h, q, k: s.astype("int32")), ValueError, "returns int32 and scores are float32"),
    "no array": (qkv(score_mod=lambda s, b, h, q, k: None), TypeError, "`score_mod` <lambda> returns NoneType; it must return one array"),
    "a custom mask of numbers": (qkv(mask=masks.Custom(lambda b, h, q, k: q - k)), ValueError,
                                 r"the value of masks.Custom\(<lambda>\)` has dtype int32; it must be bool"),
    "a custom mask of another shape": (qkv(mask=masks.Custom(lambda b, h, q, k, x: x > 0, f(8))), ValueError,
                                       r"masks.Custom\(<lambda>\) returns shape \(8,\) for a tile of scores.*index them"),
    # sinks, dropout, ids
    "sinks per batch": (qkv(sinks=f(2, 8)), ValueError, r"`sinks` has shape \(2, 8\) and `query` has 8 heads; .* \(8,\)"),
    "sinks of integers": (qkv(sinks=ints(8)), ValueError, "`sinks` has dtype int32; cast it to float32"),
    "a rate of one": (qkv(dropout_rate=1.0, dropout_key=KEY), ValueError, "`dropout_rate` is 1.0; it must be at least 0 and less than 1"),
    "a negative rate": (qkv(dropout_rate=-0.1, dropout_key=KEY), ValueError, "`dropout_rate` is -0.1; it must be at least 0"),
    "no rate": (qkv(dropout_rate=float("nan"), dropout_key=KEY), ValueError, "`dropout_rate` is nan; it must be at least 0"),
    "a rate in an array": (qkv(dropout_rate=jnp.float32(0.1), dropout_key=KEY), TypeError, "`dropout_rate` is .*pass a Python number"),
    "a rate without a key": (qkv(dropout_rate=0.1), ValueError, "`dropout_rate` is 0.1 and `dropout_key` is None; pass a key"),
    "a seed for a key": (qkv(dropout_rate=0.1, dropout_key=7), ValueError, r"`dropout_key` is 7; pass one key, jax.random.key\(seed\)"),
    "keys": (qkv(dropout_rate=0.1, dropout_key=jax.random.split(KEY)), ValueError, r"`dropout_key` is key<fry>\[2\]; pass one key"),
    "batch ids": (qkv(batch_ids=ints(3)), ValueError, r"`batch_ids` has shape \(3,\) and `query` has 2 batch elements; .* \(2,\)"),
    "head ids": (qkv(head_ids=ints(2)), ValueError, r"`head_ids` has shape \(2,\) and `query` has 8 heads; .* \(8,\)"),
    "float ids": (qkv(head_ids=f(8)), ValueError, "`head_ids` has dtype float32; cast it to int32"),
    # numbers
    "scale text": (qkv(scale="1.0"), TypeError, "`scale` is '1.0'; pass a number or a scalar array"),
    "scale list": (qkv(scale=[1.0]), TypeError, r"`scale` is \[1.0\]; pass a number"),
    "scale true": (qkv(scale=True), TypeError, "`scale` is True; pass a number"),
    "scale per head": (qkv(scale=f(8)), ValueError, r"`scale` has shape \(8,\) and dtype float32; pass a number or a scalar array"),
    "cap zero": (qkv(logits_soft_cap=0), ValueError, "`logits_soft_cap` is 0; it must be greater than 0, or None"),
    "cap zero float": (qkv(logits_soft_cap=0.0), ValueError, "`logits_soft_cap` is 0.0; it must be greater than 0"),
    "cap negative": (qkv(logits_soft_cap=-30.0), ValueError, "`logits_soft_cap` is -30.0; it must be greater than 0"),
    "cap nan": (qkv(logits_soft_cap=float("nan")), ValueError, "`logits_soft_cap` is nan; it must be greater than 0"),
    "cap numpy zero": (qkv(logits_soft_cap=np.float32(0)), ValueError, "`logits_soft_cap` is 0.*greater than 0"),
    "cap text": (qkv(logits_soft_cap="50"), TypeError, "`logits_soft_cap` is '50'; pass a number"),
    "slopes": (qkv(alibi_slopes=f(2)), ValueError,
               r"`alibi_slopes` has shape \(2,\) and `query` has 8 heads; pass one slope per query head, \(8,\) or \(2, 8\)"),
    "integer slopes": (qkv(alibi_slopes=ints(8)), ValueError, "`alibi_slopes` has dtype int32; cast it to float32"),
    # arrays over scores
    "float mask": (qkv(mask=f(6, 10)), ValueError, "`mask` has dtype float32; it must be bool.*additive mask goes to `bias`.*`mask != 0`"),
    "integer mask": (qkv(mask=ints(6, 10)), ValueError, "`mask` has dtype int32; it must be bool, True where a key is seen"),
    "padding mask": (qkv(mask=np.ones((2, 10), bool)), ValueError,
                     r"`mask` has shape \(2, 10\).*broadcast to \[B, N, T, S\] = \[2, 8, 6, 10\]: 2 against the query length 6"),
    "mask per kv head": (qkv(mask=np.ones((2, 2, 6, 10), bool)), ValueError, "2 against the number of query heads 8. Make that axis 8 or 1"),
    "mask of five axes": (qkv(mask=np.ones((1, 1, 1, 6, 10), bool)), ValueError, "`mask` has shape.*at most 4 axes"),
    "mask batch": (qkv(mask=np.ones((3, 1, 6, 10), bool)), ValueError, "3 against the batch size 2"),
    "mask keys": (qkv(mask=np.ones((6, 6), bool)), ValueError, "6 against the key length 10"),
    "boolean bias": (qkv(bias=np.ones((6, 10), bool)), ValueError, "`bias` has dtype bool.*boolean mask goes to `mask`"),
    "complex bias": (qkv(bias=np.ones((6, 10), "complex64")), ValueError, "`bias` has dtype complex64; it must be real"),
    "bias shape": (qkv(bias=f(8, 10, 6)), ValueError, r"`bias` has shape \(8, 10, 6\).*10 against the query length 6. Make"),
    # lengths, positions, segments
    "lengths size": (qkv(key_value_seq_lengths=ints(3)), ValueError,
                     r"`key_value_seq_lengths` has shape \(3,\) and the batch size is 2; pass one integer per batch element, \(2,\)"),
    "query lengths size": (qkv(query_seq_lengths=ints(2, 1)), ValueError, r"`query_seq_lengths` has shape \(2, 1\) and the batch size"),
    "float lengths": (qkv(key_value_seq_lengths=f(2)), ValueError, "`key_value_seq_lengths` has dtype float32; cast it to int32"),
    "cumulative lengths": (qkv(query_seq_lengths=[0, 3, 6]), ValueError, r"`query_seq_lengths` has shape \(3,\)"),
    "only query segments": (qkv(query_segment_ids=ints(2, 6)), ValueError,
                            "`query_segment_ids` is given and `key_value_segment_ids` is not; pass both"),
    "only key segments": (qkv(key_value_segment_ids=ints(2, 10)), ValueError,
                          "`key_value_segment_ids` is given and `query_segment_ids` is not; pass both"),
    "segments size": (qkv(query_segment_ids=ints(2, 10), key_value_segment_ids=ints(2, 10)), ValueError,
                      r"`query_segment_ids` has shape \(2, 10\) and `query` has batch size 2 and length 6; pass \(6,\) or \(2, 6\)"),
    "float segments": (qkv(query_segment_ids=f(2, 6), key_value_segment_ids=ints(2, 10)), ValueError,
                       "`query_segment_ids` has dtype float32; cast it to int32"),
    "query positions": (qkv(query_positions=ints(10)), ValueError, r"`query_positions` has shape \(10,\) and `query`.*length 6"),
    "key positions": (qkv(key_value_positions=ints(3, 10)), ValueError,
                      r"`key_value_positions` has shape \(3, 10\) and `key` has batch size 2 and length 10; pass \(10,\) or \(2, 10\)"),
    "float positions": (qkv(key_value_positions=f(10)), ValueError, "`key_value_positions` has dtype float32"),
    "wide lengths": (qkv(key_value_seq_lengths=np.array([4, 2**31])), ValueError,
                     "`key_value_seq_lengths` holds 2147483648, which does not fit into int32; pass values from -2147483648 to 2147483647"),
    "wide segments": (qkv(query_segment_ids=np.zeros(6, int), key_value_segment_ids=np.full(10, 2**32)), ValueError,
                      "`key_value_segment_ids` holds 4294967296, which does not fit into int32"),
    "wide position": (qkv(query_positions=np.full(6, -2**31 - 1)), ValueError, "`query_positions` holds -2147483649, which does not"),
    # windows
    "negative window": (qkv(local_window_size=-1), ValueError, "`local_window_size` is -1; pass an integer >= 0, or None for no limit"),
    "negative side": (qkv(local_window_size=(3, -1)), ValueError, "`local_window_size` is -1; pass an integer >= 0"),
    "float window": (qkv(local_window_size=3.0), ValueError, r"`local_window_size` is 3.0; pass an integer w for \(w, w\), or \(left"),
    "float side": (qkv(local_window_size=(3.0, 0)), TypeError, "`local_window_size` is 3.0; pass an integer >= 0"),
    "three sides": (qkv(local_window_size=(3, 0, 1)), ValueError, r"`local_window_size` is \(3, 0, 1\); pass an integer w"),
    "window text": (qkv(local_window_size="3"), ValueError, "`local_window_size` is '3'; pass an integer w"),
    "window true": (qkv(local_window_size=True), ValueError, "`local_window_size` is True; pass an integer w"),
    # implementations
    "implementation": (qkv(implementation="flash"), ValueError, "`implementation` is 'flash'; pass None or one of 'tpu', .*'cudnn', 'xla'"),
    "no GPU": (qkv(implementation="cudnn"), NotImplementedError, "implementation='cudnn' cannot compute this: it needs an NVIDIA GPU"),
    "no device": (qkv(implementation="tpu"), NotImplementedError, "implementation='tpu' cannot compute this: .+"),
    # masks, bound to sizes
    "segments no key": (qkv(mask=masks.Segments(ints(6))), ValueError, "`masks.Segments` has no `key`.*6 queries and 10 keys; pass `key`"),
    "segments query": (qkv(mask=masks.Segments(ints(7), ints(10))), ValueError, r"`masks.Segments.query` has shape \(7,\) and `query`"),
    "segments key": (qkv(mask=masks.Segments(ints(6), ints(7))), ValueError, r"`masks.Segments.key` has shape \(7,\) and `key`"),
    "mask lengths": (qkv(mask=masks.Lengths(key=ints(3))), ValueError, r"`masks.Lengths.key` has shape \(3,\) and the batch size is 2"),
    "mask float lengths": (qkv(mask=masks.Lengths(query=f(2))), ValueError, "`masks.Lengths.query` has dtype float32; cast"),
    "prefix": (qkv(mask=masks.PrefixLM(ints(3))), ValueError, r"`masks.PrefixLM.n` has shape \(3,\) and the batch size is 2"),
    "wide prefix": (qkv(mask=masks.PrefixLM(2**40)), ValueError, "`masks.PrefixLM.n` holds 1099511627776, which does not fit into int32"),
    "no prefix": (qkv(mask=masks.PrefixLM(None)), TypeError, r"`masks.PrefixLM.n` is None; pass an integer, or integers \[B\]"),
    "float length": (qkv(mask=masks.Lengths(key=3.5)), TypeError, r"`masks.Lengths.key` is 3.5; pass an integer, or integers \[B\]"),
    "window array": (qkv(mask=masks.Window(ints(2))), ValueError, r"`masks.Window.left` has shape \(2,\); pass an integer"),
    "float window array": (qkv(mask=masks.Window(None, f(1))), ValueError, "`masks.Window.right` has dtype float32"),
    "dense": (qkv(mask=masks.Dense(np.ones((6, 9), bool))), ValueError, r"`masks.Dense.array` has shape \(6, 9\).*9 against the key length 10"),
    "dense five axes": (qkv(mask=masks.Dense(np.ones((1, 1, 1, 6, 10), bool))), ValueError, "`masks.Dense.array`.*at most 4 axes"),
    "dense five axes by position": (qkv(mask=masks.Dense(np.ones((1, 1, 1, 6, 10), bool)), query_positions=ints(6)), ValueError,
                                    "`masks.Dense.array`.*at most 4 axes"),
    "dense heads by position": (qkv(mask=masks.Dense(np.ones((2, 6, 10), bool)), query_positions=ints(6)), ValueError,
                                "`masks.Dense.array` has 2 along the axis of the number of query heads 8; make it 8 or 1"),
    "blocks": (qkv(mask=masks.BlockSparse(np.ones((2, 2), bool), (4, 4))), ValueError,
               "`masks.BlockSparse.table` has 2 x 2 blocks of 4 x 4, and 6 queries by 10 keys need 2 x 3"),
    "blocks heads": (qkv(mask=masks.BlockSparse(np.ones((2, 2, 3), bool), 4)), ValueError,
                     "`masks.BlockSparse.table` has 2 along the axis of the number of query heads 8"),
    "blocks rank": (qkv(mask=masks.BlockSparse(np.ones(3, bool), 4)), ValueError, r"`masks.BlockSparse.table` has shape \(3,\); pass \[query blocks"),
    "custom float": (qkv(mask=masks.Custom(lambda b, h, q, k: (q - k).astype("float32"))), ValueError,
                     "`the value of masks.Custom.*has dtype float32; it must be bool"),
    "mask text": (qkv(mask="causal"), TypeError, "`mask` is 'causal'; pass a boolean array or a mask from jflash.masks"),
    "mask number": (qkv(mask=1), ValueError, "`mask` has dtype int32; it must be bool.*or a mask from jflash.masks"),
    "a class": (qkv(mask=masks.Causal), TypeError, r"`mask` is the class Causal; pass an instance, masks.Causal\("),
    "a bare rule": (qkv(mask=lambda b, h, q, k: q >= k), TypeError, r"`mask` is a function; pass masks.Custom\("),
}


@pytest.mark.parametrize("kwargs, error, message", ERRORS.values(), ids=ERRORS.keys())
def test_attention_says_what_is_wrong(kwargs, error, message):
  with pytest.raises(error, match=message):
    jflash.attention(**kwargs)


MASK_ERRORS = {
    "negative": (lambda: masks.Window(-1), ValueError, "`masks.Window.left` is -1; pass an integer >= 0"),
    "negative numpy": (lambda: masks.Window(None, np.int64(-2)), ValueError, "`masks.Window.right` is -2; pass an integer >= 0"),
    "float": (lambda: masks.Window(1.5), TypeError, "`masks.Window.left` is 1.5; pass an integer >= 0, or None"),
    "pair": (lambda: masks.Window((3, 0)), TypeError, r"`masks.Window.left` is \(3, 0\); pass an integer"),
    "true": (lambda: masks.Window(True), TypeError, "`masks.Window.left` is True; pass an integer"),
    "dense dtype": (lambda: masks.Dense(f(3, 4)), ValueError, "`masks.Dense.array` has dtype float32; it must be bool.*`array != 0`"),
    "table dtype": (lambda: masks.BlockSparse(ints(3, 4), 8), ValueError, "`masks.BlockSparse.table` has dtype int32; it must be bool"),
    "block zero": (lambda: masks.BlockSparse(np.ones((3, 4), bool), 0), ValueError, r"block_shape` is \(0, 0\); pass two integers >= 1"),
    "block three": (lambda: masks.BlockSparse(np.ones((3, 4), bool), (1, 2, 3)), ValueError, "pass two integers >= 1"),
    "block float": (lambda: masks.BlockSparse(np.ones((3, 4), bool), (1.0, 2)), ValueError, "pass two integers >= 1"),
    "and number": (lambda: masks.Causal() & 3, TypeError, "combines with another mask or a boolean array, not with 3 of type int"),
    "or none": (lambda: None | masks.Causal(), TypeError, "not with None of type NoneType"),
    "and float array": (lambda: masks.Causal() & f(3, 4), ValueError, "`masks.Dense.array` has dtype float32; it must be bool"),
    "truth": (lambda: not masks.Causal(), TypeError, "no truth value"),
}


@pytest.mark.parametrize("make, error, message", MASK_ERRORS.values(), ids=MASK_ERRORS.keys())
def test_masks_say_what_is_wrong(make, error, message):
  with pytest.raises(error, match=message):
    make()


def test_errors_come_while_tracing():
  with pytest.raises(ValueError, match="`mask` has dtype float32"):
    jax.eval_shape(jflash.attention, Q, K, V, mask=jax.ShapeDtypeStruct((6, 10), jnp.float32))
