"""The ONNX form of `operators.wkv7`: one token at once, or a scan over chunks of a prompt.

Inside a chunk of C tokens the recurrence is a triangular system. With W_t the product of the decays
up to t, and a~ = W_(t-1) a, b~ = b / W_t, k~ = k / W_t, r~ = W_t r:

    u_t = S a~_t + sum over s < t of u_s (b~_s a~_t) + v_s (k~_s a~_t)
    y_t = S r~_t + sum over s <= t of u_s (b~_s r~_t) + v_s (k~_s r~_t)
    S'  = (S + sum of u_s b~_s^T + v_s k~_s^T) W_C

The system is solved with the inverse of its triangle, merged from the inverses of blocks of 1, 2,
4, ... tokens: T2 M21 T1 below the diagonal. A product of powers of M, as is usual, loses all digits
where tokens repeat: their keys are alike, and powers grow like binomials and cancel. A decay is at
least exp(-exp(-1/2)) = 0.545, so 1 / W stays below 3e8 for 32 tokens.
Source: arXiv 2503.14456 (RWKV-7) for the recurrence, arXiv 2406.06484 for the chunks.
"""

from __future__ import annotations

import onnx_ir as ir

from pleexport.backends.onnx.expansion import Operator, sizes

_CHUNK = 32
_LEVELS = 5  # blocks of 1 to 16 tokens are merged
# One token: its outputs y_1, and the state s_1 after it.
_SINGLE = """
      a_column = Reshape (a, columns)
      v_column = Reshape (v, columns)
      r_column = Reshape (r, columns)
      b_row = Reshape (b, rows)
      k_row = Reshape (k, rows)
      log_w_row = Reshape (log_w, rows)
      w_row = Exp (log_w_row)
      u = MatMul (s_0, a_column)
      new_columns = Concat <axis = 2> (u, v_column)
      new_rows = Concat <axis = 1> (b_row, k_row)
      new = MatMul (new_columns, new_rows)
      decayed = Mul (s_0, w_row)
      s_1 = Add (decayed, new)
      y_column = MatMul (s_1, r_column)
      y_1 = Reshape (y_column, of_tokens)
"""


def _body(node: ir.Node) -> str:
    """The operators in ONNX's textual form; H heads of size N."""
    _, _, heads, size = sizes(node.inputs[0])
    names = ("r", "log_w", "k", "v", "a", "b")
    cut = "\n".join(
        f"""    {n}_padded = Pad ({n}, pads)
    {n}_cut = Reshape ({n}_padded, cut_shape)
    {n}_chunks = Transpose <perm = [0, 2, 1, 3]> ({n}_cut)"""
        for n in names
    )
    solve = "\n".join(
        f"""      m_{i} = Where (level_{i}, m, zero_f)
      tm_{i} = MatMul (t_{i}, m_{i})
      tmt_{i} = MatMul (tm_{i}, t_{i})
      t_{i + 1} = Add (t_{i}, tmt_{i})"""
        for i in range(_LEVELS)
    )
    levels = "\n".join(
        f"""    shift_{i} = Constant <value = int64 {{{1 << i}}}> ()
    block_{i} = Div (places, shift_{i})
    row_{i} = Reshape (block_{i}, as_column)
    column_{i} = Sub (row_{i}, one)
    odd_{i} = Mod (row_{i}, two)
    is_odd_{i} = Equal (odd_{i}, one)
    is_left_{i} = Equal (column_{i}, block_{i})
    level_{i} = And (is_odd_{i}, is_left_{i})"""
        for i in range(_LEVELS)
    )
    return f"""(r, log_w, k, v, a, b, state) => (y, state_out) {{
  one = Constant <value = int64 {{1}}> ()
  zero = Constant <value = int64 {{0}}> ()
  axis_0 = Constant <value = int64[1] {{0}}> ()
  axis_1 = Constant <value = int64[1] {{1}}> ()
{_shapes(heads, size)}
  of_heads = Constant <value = int64[2] {{{heads}, {size}}}> ()
  most = Constant <value = int64[1] {{{_CHUNK}}}> ()
  no_pads = Constant <value = int64[5] {{0, 0, 0, 0, 0}}> ()
  end_pads = Constant <value = int64[2] {{0, 0}}> ()
  minus_one = Constant <value = int64 {{-1}}> ()
  minus_one_1 = Constant <value = int64[1] {{-1}}> ()
  tokens_1 = Shape <start = 1, end = 2> (r)
  tokens = Squeeze (tokens_1)
  is_single = Equal (tokens, one)
  s_0 = Squeeze (state, axis_0)
  y, s_n = If (is_single) <
    then_branch = single () => (y_1, s_1) {{
{_SINGLE}    }},
    else_branch = chunked () => (y_t, s_t) {{
    chunk = Min (tokens_1, most)
    rest = Mod (tokens_1, chunk)
    lacking = Sub (chunk, rest)
    missing = Mod (lacking, chunk)
    pads = Concat <axis = 0> (no_pads, missing, end_pads)
    two = Constant <value = int64 {{2}}> ()
    zero_f = Constant <value = float {{0.0}}> ()
    as_column = Constant <value = int64[2] {{-1, 1}}> ()
    chunk_s = Squeeze (chunk)
    places = Range (zero, chunk_s, one)
    places_c = Reshape (places, as_column)
    diagonal = Equal (places_c, places)
    t_0 = Cast <to = 1> (diagonal)
{levels}
    cut_shape = Concat <axis = 0> (minus_one_1, chunk, of_heads)
{cut}
    s_t, y_chunks = Scan <num_scan_inputs = 6, body = each_chunk
      (s_in, r_c, log_w_c, k_c, v_c, a_c, b_c) => (s_out, y_out) {{
      log_decay = CumSum (log_w_c, one)
      log_before = Sub (log_decay, log_w_c)
      log_inverse = Neg (log_decay)
      decay = Exp (log_decay)
      before = Exp (log_before)
      inverse = Exp (log_inverse)
      a_t = Mul (a_c, before)
      r_t = Mul (r_c, decay)
      b_t = Mul (b_c, inverse)
      k_t = Mul (k_c, inverse)
      b_turned = Transpose <perm = [0, 2, 1]> (b_t)
      k_turned = Transpose <perm = [0, 2, 1]> (k_t)
      s_turned = Transpose <perm = [0, 2, 1]> (s_in)
      ab = MatMul (a_t, b_turned)
      ak = MatMul (a_t, k_turned)
      rb = MatMul (r_t, b_turned)
      rk = MatMul (r_t, k_turned)
      m = Trilu <upper = 0> (ab, minus_one)
      ak_before = Trilu <upper = 0> (ak, minus_one)
      rb_until = Trilu <upper = 0> (rb)
      rk_until = Trilu <upper = 0> (rk)
      from_state = MatMul (a_t, s_turned)
      from_values = MatMul (ak_before, v_c)
      u_0 = Add (from_state, from_values)
{solve}
      u = MatMul (t_{_LEVELS}, u_0)
      y_state = MatMul (r_t, s_turned)
      y_u = MatMul (rb_until, u)
      y_v = MatMul (rk_until, v_c)
      y_uv = Add (y_u, y_v)
      y_heads = Add (y_state, y_uv)
      y_out = Transpose <perm = [1, 0, 2]> (y_heads)
      uv = Concat <axis = 1> (u, v_c)
      bk = Concat <axis = 1> (b_t, k_t)
      uv_turned = Transpose <perm = [0, 2, 1]> (uv)
      new = MatMul (uv_turned, bk)
      grown = Add (s_in, new)
      last_1 = Sub (chunk, axis_1)
      last = Gather <axis = 1> (decay, last_1)
      s_out = Mul (grown, last)
    }}> (s_0, r_chunks, log_w_chunks, k_chunks, v_chunks, a_chunks, b_chunks)
    y_padded = Reshape (y_chunks, of_tokens)
    y_t = Slice (y_padded, axis_0, tokens_1, axis_1)
    }}
  >
  state_out = Unsqueeze (s_n, axis_0)
}}"""


def _shapes(heads: int, size: int) -> str:
    return f"""  rows = Constant <value = int64[3] {{{heads}, 1, {size}}}> ()
  columns = Constant <value = int64[3] {{{heads}, {size}, 1}}> ()
  of_tokens = Constant <value = int64[4] {{1, -1, {heads}, {size}}}> ()"""


def _single_body(node: ir.Node) -> str:
    """The operators for calls of one token, without a branch or a loop."""
    _, _, heads, size = sizes(node.inputs[0])
    return f"""(r, log_w, k, v, a, b, state) => (y_1, state_out) {{
{_shapes(heads, size)}
  of_heads = Constant <value = int64[3] {{{heads}, {size}, {size}}}> ()
  of_state = Constant <value = int64[4] {{1, {heads}, {size}, {size}}}> ()
  s_0 = Reshape (state, of_heads)
{_SINGLE}
  state_out = Reshape (s_1, of_state)
}}"""


WKV7 = Operator("Wkv7", ("y", "state_out"), {}, _body)
WKV7_SINGLE = Operator("Wkv7", ("y", "state_out"), {}, _single_body)
