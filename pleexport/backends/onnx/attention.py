"""The ONNX forms of `operators.attend_window` and `attend_context`.

A context is attended to at once where that takes few scores: for one token, or a short text. Else
it goes by a scan over the blocks of its cache, as does a cache that has to be widened.

A scan hands out views, so a block in 16 or 8 bits is widened while the processor's own cache holds
it, and scores never exceed one block. Blocks that nobody sees are skipped: time follows the length
of the text, not the capacity. Maximum and sum of the softmax are carried from block to block.
Source: arXiv 2205.14135 (FlashAttention), algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from pleexport.backends.onnx.expansion import Operator, sizes

# Pairs of a token and a slot: their scores take a few megabytes, and a scan takes 0.8 ms to begin.
_MOST_AT_ONCE = 1 << 18


@dataclass(frozen=True)
class _Variant:
    """What the operators depend on.

    Attributes:
        widened: the cache is not in float32.
        scaled: its vectors have scales.
        softcap: scores become softcap * tanh(scores / softcap); 0 for none.
        window: positions that a query sees, its own included; 0 for all.
    """

    widened: bool
    scaled: bool
    heads: int
    cache_heads: int
    head_dim: int
    value_dim: int
    block: int
    softcap: float
    window: int

    @property
    def repeats(self) -> int:
        """Query heads that share a head of the cache."""
        return self.heads // self.cache_heads


def _variant(node: ir.Node) -> _Variant:
    heads, head_dim = sizes(node.inputs[0])[2:]
    keys = node.inputs[1]
    assert keys is not None
    return _Variant(
        widened=keys.dtype != ir.DataType.FLOAT,
        scaled=len(node.inputs) > 5,
        heads=heads,
        cache_heads=sizes(keys)[1],
        head_dim=head_dim,
        value_dim=sizes(node.inputs[2])[3],
        block=node.attributes["block"].as_int(),
        softcap=node.attributes["softcap"].as_float(),
        window=node.attributes["window"].as_int(),
    )


def _context_body(node: ir.Node) -> str:
    """The operators in ONNX's textual form."""
    v = _variant(node)
    scales = ", key_scales, value_scales" if v.scaled else ""
    head = f"(query, keys, values{scales}, query_ids, held_once) => (out)"
    if v.widened:
        return f"{head} {{{_in_blocks(v)}}}"
    return f"""{head} {{
  tokens_at_once = Size (query_ids)
  slots_at_once = Size (held_once)
  pairs = Mul (tokens_at_once, slots_at_once)
  most_pairs = Constant <value = int64 {{{_MOST_AT_ONCE}}}> ()
  is_few = LessOrEqual (pairs, most_pairs)
  out = If (is_few) <
    then_branch = at_once () => (found_at_once) {{{_at_once(v, out="found_at_once")}}},
    else_branch = in_blocks () => (found_in_blocks) {{{_in_blocks(v, out="found_in_blocks")}}}
  >
}}"""


def _at_once(v: _Variant, *, out: str) -> str:
    """Scores of all slots, `[K, T, N / K, C]`."""
    capped = ""
    if v.softcap:
        capped = f"""softcap = Constant <value = float {{{v.softcap}}}> ()
      share = Div (products, softcap)
      bounded = Tanh (share)
      scores = Mul (bounded, softcap)"""
    return f"""
      zero = Constant <value = int64 {{0}}> ()
      visible_bias = Constant <value = float {{0.0}}> ()
      hidden_bias = Constant <value = float {{-1e30}}> ()
      column_of_tokens = Constant <value = int64[3] {{-1, 1, 1}}> ()
      query_positions = Reshape (query_ids, column_of_tokens)
      written = GreaterOrEqual (held_once, zero)
      not_later = LessOrEqual (held_once, query_positions)
      {_visible(v, held="held_once")}
      bias = Where (visible, visible_bias, hidden_bias)
      {_rows_of_heads(v.heads, v.cache_heads, v.head_dim)}
      turned_keys = Transpose <perm = [0, 1, 3, 2]> (keys)
      {"products" if v.softcap else "scores"} = MatMul (rows, turned_keys)
      {capped}
      by_token_shape = Constant <value = int64[4] {{{v.cache_heads}, -1, {v.repeats}, 0}}> ()
      scores_by_token = Reshape (scores, by_token_shape)
      masked = Add (scores_by_token, bias)
      shares = Softmax <axis = -1> (masked)
      {_normal("shares", out="weights_by_token")}
      by_row_shape = Constant <value = int64[4] {{1, {v.cache_heads}, -1, 0}}> ()
      weights = Reshape (weights_by_token, by_row_shape)
      found = MatMul (weights, values)
      {_heads_of_rows(v.heads, v.cache_heads, v.value_dim, out=out)}
    """


def _normal(shares: str, *, out: str) -> str:
    """Shares of a softmax, none below 1e-30.

    Where scores differ by more than 87, the smaller share is no normal number, and processors
    multiply by such numbers many times more slowly. A sum of shares loses 1e-30 all the same. Not a
    number stays that.
    """
    return f"""least_share = Constant <value = float {{1e-30}}> ()
      {out} = Clip ({shares}, least_share)"""


def _visible(v: _Variant, *, held: str) -> str:
    """Which slots a query sees, of those written and not later than itself."""
    if not v.window:
        return "visible = And (written, not_later)"
    return f"""until_now = And (written, not_later)
          window = Constant <value = int64 {{{v.window}}}> ()
          first = Sub (query_positions, window)
          not_before = Greater ({held}, first)
          visible = And (until_now, not_before)"""


def _in_blocks(v: _Variant, *, out: str = "out") -> str:
    """A scan that carries maximum, sum and total of the softmax.

    K heads of the cache, R rows of queries for each (a row is one query head of one token), B slots
    of a block. The blocks come head by head; each changes the state of its own head only.
    """
    shared, repeats = v.cache_heads, v.repeats
    one_head = shared == 1
    rows_shape = [-1, v.head_dim] if one_head else [shared, -1, v.head_dim]
    scale_blocks = ", key_scale_blocks, value_scale_blocks" if v.scaled else ""
    scale_block = ", key_scale, value_scale" if v.scaled else ""

    capped_scores = "scores = Identity (raw_scores)"
    if v.softcap:
        capped_scores = """share = Div (raw_scores, softcap)
          bounded = Tanh (share)
          scores = Mul (bounded, softcap)"""

    def own(state: str) -> str:
        """The part of a state that belongs to the block's head."""
        return f"Identity ({state})" if one_head else f"Gather ({state}, head)"

    def merged(new: str, state: str) -> str:
        """A state with the part of the block's head replaced."""
        return f"Identity ({new})" if one_head else f"Where (is_own, {new}, {state})"

    return f"""
  zero = Constant <value = int64 {{0}}> ()
  one = Constant <value = int64 {{1}}> ()
  axis_1 = Constant <value = int64[1] {{1}}> ()
  axes_1_2 = Constant <value = int64[2] {{1, 2}}> ()
  block = Constant <value = int64 {{{v.block}}}> ()
  heads = Constant <value = int64 {{{shared}}}> ()
  heads_1 = Constant <value = int64[1] {{{shared}}}> ()
  visible_bias = Constant <value = float {{0.0}}> ()
  hidden_bias = Constant <value = float {{-1e30}}> ()

  capacity_1 = Shape (held_once)
  capacity = Squeeze (capacity_1)
  held = {"Identity (held_once)" if one_head else "Tile (held_once, heads_1)"}
  row_of_slots = Constant <value = int64[3] {{-1, 1, {v.block}}}> ()
  held_blocks = Reshape (held, row_of_slots)

  column_of_tokens = Constant <value = int64[3] {{-1, 1, 1}}> ()
  query_positions = Reshape (query_ids, column_of_tokens)
  newest_held = ReduceMax <keepdims = 0> (held_blocks, axes_1_2)
  needed = GreaterOrEqual (newest_held, zero)
  all_slots = Mul (capacity, heads)
  starts = Range (zero, all_slots, block)
  head_of_block = Div (starts, capacity)

  block_of_vectors = Constant <value = int64[3] {{-1, {v.block}, {v.head_dim}}}> ()
  key_blocks = Reshape (keys, block_of_vectors)
  block_of_values = Constant <value = int64[3] {{-1, {v.block}, {v.value_dim}}}> ()
  value_blocks = Reshape (values, block_of_values)
  {"key_scale_blocks = Reshape (key_scales, row_of_slots)" if v.scaled else ""}
  {"value_scale_blocks = Reshape (value_scales, row_of_slots)" if v.scaled else ""}

  grouped_shape = Constant <value = int64[4] {{-1, {shared}, {repeats}, {v.head_dim}}}> ()
  grouped = Reshape (query, grouped_shape)
  by_head = {"Identity (grouped)" if one_head else "Transpose <perm = [1, 0, 2, 3]> (grouped)"}
  rows_shape = Constant <value = int64[{len(rows_shape)}] {{{", ".join(map(str, rows_shape))}}}> ()
  rows = Reshape (by_head, rows_shape)
  tokens_1 = Shape <start = 1> (query_ids)
  repeats_1 = Constant <value = int64[1] {{{repeats}}}> ()
  width_1 = Constant <value = int64[1] {{{v.value_dim}}}> ()
  softcap = Constant <value = float {{{v.softcap or 1.0}}}> ()
  row_count = Mul (tokens_1, repeats_1)
  total_shape = Concat <axis = 0> ({"" if one_head else "heads_1, "}row_count, axis_1)
  sum_shape = Concat <axis = 0> ({"" if one_head else "heads_1, "}row_count, width_1)
  no_maximum = ConstantOfShape <value = float[1] {{-1e30}}> (total_shape)
  no_total = ConstantOfShape <value = float[1] {{0.0}}> (total_shape)
  no_sum = ConstantOfShape <value = float[1] {{0.0}}> (sum_shape)

  scores_by_token = Constant <value = int64[3] {{-1, {repeats}, {v.block}}}> ()
  scores_shape = Constant <value = int64[2] {{-1, {v.block}}}> ()
  head_ids_0 = Range (zero, heads, one)
  head_ids = Reshape (head_ids_0, column_of_tokens)
  maximum_n, total_n, sum_n = Scan <num_scan_inputs = {5 + 2 * v.scaled}, body = each_block
    (maximum, total, sum, need, head, held_block, key_block, value_block{scale_block})
    => (maximum_2, total_2, sum_2) {{
      maximum_2, total_2, sum_2 = If (need) <
        then_branch = visited () => (maximum_1, total_1, sum_1) {{
          row = {own("rows")}
          own_maximum = {own("maximum")}
          own_total = {own("total")}
          own_sum = {own("sum")}
          wide_keys = {"Cast <to = 1>" if v.widened else "Identity"} (key_block)
          turned_keys = Transpose <perm = [1, 0]> (wide_keys)
          products = MatMul (row, turned_keys)
          raw_scores = {"Mul (products, key_scale)" if v.scaled else "Identity (products)"}
          {capped_scores}
          written = GreaterOrEqual (held_block, zero)
          not_later = LessOrEqual (held_block, query_positions)
          {_visible(v, held="held_block")}
          bias = Where (visible, visible_bias, hidden_bias)
          by_token = Reshape (scores, scores_by_token)
          masked_by_token = Add (by_token, bias)
          masked = Reshape (masked_by_token, scores_shape)
          block_maximum = ReduceMax <keepdims = 1> (masked, axis_1)
          new_maximum = Max (own_maximum, block_maximum)
          below = Sub (masked, new_maximum)
          shares = Exp (below)
          {_normal("shares", out="weights")}
          fallen = Sub (own_maximum, new_maximum)
          fade = Exp (fallen)
          block_total = ReduceSum <keepdims = 1> (weights, axis_1)
          faded_total = Mul (own_total, fade)
          new_total = Add (faded_total, block_total)
          scaled_weights = {"Mul (weights, value_scale)" if v.scaled else "Identity (weights)"}
          wide_values = {"Cast <to = 1>" if v.widened else "Identity"} (value_block)
          block_sum = MatMul (scaled_weights, wide_values)
          faded_sum = Mul (own_sum, fade)
          new_sum = Add (faded_sum, block_sum)
          is_own = Equal (head_ids, head)
          maximum_1 = {merged("new_maximum", "maximum")}
          total_1 = {merged("new_total", "total")}
          sum_1 = {merged("new_sum", "sum")}
        }},
        else_branch = skipped () => (same_maximum, same_total, same_sum) {{
          same_maximum = Identity (maximum)
          same_total = Identity (total)
          same_sum = Identity (sum)
        }}
      >
    }}
  > (no_maximum, no_total, no_sum, needed, head_of_block, held_blocks, key_blocks,
     value_blocks{scale_blocks})

  weighted = Div (sum_n, total_n)
  out_by_head = Constant <value = int64[4] {{{shared}, -1, {repeats}, {v.value_dim}}}> ()
  split = Reshape (weighted, out_by_head)
  by_token_n = {"Identity (split)" if one_head else "Transpose <perm = [1, 0, 2, 3]> (split)"}
  out_shape = Constant <value = int64[3] {{1, -1, {v.heads * v.value_dim}}}> ()
  {out} = Reshape (by_token_n, out_shape)
"""


def _rows_of_heads(heads: int, shared: int, head_dim: int) -> str:
    """Queries `[1, T, N, D]` as `rows`, `[1, K, T * N / K, D]`: a key head's side by side."""
    if shared == 1:
        return f"""rows_shape = Constant <value = int64[4] {{1, 1, -1, {head_dim}}}> ()
  rows = Reshape (query, rows_shape)"""
    grouped = f"1, -1, {shared}, {heads // shared}, {head_dim}"
    return f"""rows_shape = Constant <value = int64[4] {{1, {shared}, -1, {head_dim}}}> ()
  grouped_shape = Constant <value = int64[5] {{{grouped}}}> ()
  grouped = Reshape (query, grouped_shape)
  by_head = Transpose <perm = [0, 2, 1, 3, 4]> (grouped)
  rows = Reshape (by_head, rows_shape)"""


def _heads_of_rows(heads: int, shared: int, value_dim: int, *, out: str) -> str:
    """`found`, a row for each query, as `[1, T, N * D]`."""
    shape = f"out_shape = Constant <value = int64[3] {{1, -1, {heads * value_dim}}}> ()"
    if shared == 1:
        return f"""{shape}
  {out} = Reshape (found, out_shape)"""
    by_head = f"1, {shared}, -1, {heads // shared}, {value_dim}"
    return f"""{shape}
  found_shape = Constant <value = int64[5] {{{by_head}}}> ()
  found_by_head = Reshape (found, found_shape)
  by_token = Transpose <perm = [0, 2, 1, 3, 4]> (found_by_head)
  {out} = Reshape (by_token, out_shape)"""


def _window_body(node: ir.Node) -> str:
    """The operators in ONNX's textual form; K heads of the cache, R queries for each a token."""
    heads, head_dim = sizes(node.inputs[0])[2:]
    shared, value_dim = sizes(node.inputs[1])[1], sizes(node.inputs[2])[3]
    repeats = heads // shared
    # What depends on the bias alone is the same in every layer, and merged afterwards.
    bias_rows = "bias_rows = Unsqueeze (bias, axis_1)"
    if repeats > 1:
        bias_rows = f"""axes_1_3 = Constant <value = int64[2] {{1, 3}}> ()
  bias_5 = Unsqueeze (bias, axes_1_3)
  repeated_shape = Constant <value = int64[5] {{1, 1, 1, {repeats}, 1}}> ()
  repeated = Expand (bias_5, repeated_shape)
  slots_1 = Shape <start = 2, end = 3> (bias)
  all_rows = Constant <value = int64[3] {{1, 1, -1}}> ()
  bias_shape = Concat <axis = 0> (all_rows, slots_1)
  bias_rows = Reshape (repeated, bias_shape)"""
    return f"""(query, keys, values, bias) => (out) {{
  axis_1 = Constant <value = int64[1] {{1}}> ()
  {_rows_of_heads(heads, shared, head_dim)}
  turned_keys = Transpose <perm = [0, 1, 3, 2]> (keys)
  scores = MatMul (rows, turned_keys)
  {bias_rows}
  masked = Add (scores, bias_rows)
  shares = Softmax <axis = -1> (masked)
  {_normal("shares", out="weights")}
  found = MatMul (weights, values)
  {_heads_of_rows(heads, shared, value_dim, out="out")}
}}"""


ATTEND_CONTEXT = Operator(
    "AttendContext",
    ("out",),
    {"block": "INT", "softcap": "FLOAT", "window": "INT"},
    _context_body,
)
ATTEND_WINDOW = Operator("AttendWindow", ("out",), {}, _window_body)
