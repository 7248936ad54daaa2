"""Translate a traced program to ONNX."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes import InPlacePass
from onnx_ir.passes import common as passes
from onnxscript.values import Op, Opset

import pleexport.operators  # noqa: F401  registers torch.ops.pleexport
from pleexport.backends.onnx.attention import ATTEND_CONTEXT, ATTEND_WINDOW
from pleexport.backends.onnx.expansion import OPSET, Expand, sizes
from pleexport.backends.onnx.grouped import ATTEND_CACHE, WRITE_CACHE, GroupAttention
from pleexport.backends.onnx.passes import (
    AnglesOnHost,
    CountLogits,
    FixReshapes,
    KeepOutputs,
    LeaveCasts,
    MergeReshapes,
    NameDimensions,
)
from pleexport.backends.onnx.recurrence import WKV7, WKV7_SINGLE
from pleexport.backends.onnx.rotation import ROTATE
from pleexport.program import LOGIT_POSITIONS, Program
from pleexport.progress import quiet

_Translations = dict[Callable[..., Any], Callable[..., Any]]
_onnx = Opset("", OPSET)
_OPERATORS = (ROTATE, ATTEND_WINDOW, ATTEND_CONTEXT, WKV7)
_OPERATORS_ON_GPU = (ROTATE, WKV7_SINGLE)
_rotate_op, _attend_window_op, _attend_context_op, _wkv7_op = (o.op for o in _OPERATORS)
_write_cache_op, _attend_cache_op = WRITE_CACHE.op, ATTEND_CACHE.op


def translate(program: Program) -> ir.Model:
    """The ONNX form of a traced program, its weights still without values."""
    on_gpu = program.contract.processor == "gpu"
    with warnings.catch_warnings(), quiet("torch.onnx"):
        warnings.simplefilter("ignore")
        exported = _export(program, _TRANSLATIONS | (_ON_GPU if on_gpu else {}))
    assert exported is not None
    model = exported.model
    for step in (
        NameDimensions(program.arguments),
        CountLogits(LOGIT_POSITIONS),
        KeepOutputs(program.results),
        FixReshapes(),
        *(_steps_for_gpu(program) if on_gpu else ()),
        Expand(_OPERATORS_ON_GPU if on_gpu else _OPERATORS),
        MergeReshapes(),
        passes.IdentityEliminationPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.RemoveUnusedNodesPass(),
        # The exporter notes source lines of the machine it ran on.
        passes.ClearMetadataAndDocStringPass(),
    ):
        step(model)
    model.producer_name = "pleexport"
    model.producer_version = None
    return model


def _export(program: Program, translations: _Translations) -> torch.onnx.ONNXProgram | None:
    """What torch makes of a program.

    It would first take operators apart, by tracing the program anew. That is three quarters of its
    time, and it translates all but a few of ours as they are: those are in `_OF_TORCH`. Where a
    family brings another one, the program is taken apart after all. So is one that changes its
    input, since torch translates none that does.
    """
    export = partial(
        torch.onnx.export,
        dynamo=True,
        opset_version=OPSET,
        optimize=False,
        verbose=False,
        input_names=[argument.name for argument in program.arguments],
        output_names=[*program.results, *program.hidden],
    )
    whole = copy.copy(program.exported)
    whole.run_decompositions = lambda *_, **__: whole
    with suppress(torch.onnx.OnnxExporterError):
        return export(whole, custom_translation_table=translations | _OF_TORCH)
    return export(program.exported, custom_translation_table=translations)


def _steps_for_gpu(program: Program) -> list[InPlacePass]:
    return [GroupAttention(program.contract.caches), AnglesOnHost(), LeaveCasts()]


def _rotate(x: Any, cos: Any, sin: Any) -> Any:
    return _rotate_op(x, cos, sin)


def _write_cache(cache: Any, new: Any, slots: Any) -> Any:
    first_slot = _onnx.Gather(slots, _onnx.Constant(value_int=0), axis=1)
    _, heads, _, width = sizes(cache)
    if heads == 1:  # a view, and one with the reshape before it
        turned = _onnx.Reshape(new, _onnx.Constant(value_ints=[1, 1, -1, width]))
    else:
        turned = _onnx.Transpose(new, perm=[0, 2, 1, 3])
    return _onnx.TensorScatter(cache, turned, first_slot, axis=-2, mode="circular")


def _attend_window(query: Any, keys: Any, values: Any, bias: Any) -> Any:
    return _attend_window_op(query, keys, values, bias)


def _attend(operator: Op) -> Callable[..., Any]:
    """What takes keys and values one by one, from what takes them together."""

    def attend(
        query: Any,
        cache: Sequence[Any],
        query_ids: Any,
        held: Any,
        block: int,
        softcap: float = 0.0,
        window: int = 0,
    ) -> Any:
        return operator(query, *cache, query_ids, held, block=block, softcap=softcap, window=window)

    return attend


def _keep_written(cache: Any, new: Any, slots: Any) -> Any:
    return _write_cache_op(cache, new, slots)


def _linear_in_steps(x: Any, weight: Any, bias: Any, input_step: Any, output_step: Any) -> Any:
    product = _onnx.MatMul(_in_steps(x, input_step), _onnx.Transpose(weight, perm=[1, 0]))
    return _in_steps(product if bias is None else _onnx.Add(product, bias), output_step)


def _in_steps(x: Any, step: Any) -> Any:
    """Two nodes in place of a quotient, a rounding, bounds and a product."""
    if step is None:
        return x
    # Unsigned, since ONNX Runtime of 1.25 knows no other codes without a zero point, and that of
    # 1.32 carries a signed one past other nodes with the wrong dtype.
    middle = _onnx.Constant(value=ir.tensor(np.array(128, dtype=np.uint8)))
    return _onnx.DequantizeLinear(_onnx.QuantizeLinear(x, step, middle), step, middle)


def _wkv7(r: Any, log_w: Any, k: Any, v: Any, a: Any, b: Any, state: Any) -> Any:
    return _wkv7_op(r, log_w, k, v, a, b, state)


def _rms_norm(x: Any, shape: Sequence[int], weight: Any, eps: float) -> Any:
    return _onnx.RMSNormalization(x, weight, epsilon=eps, axis=-len(shape))


def _to(x: Any, dtype: int) -> Any:
    return x if x.dtype == dtype else _onnx.Cast(x, to=dtype)


def _square(x: Any) -> Any:
    return _onnx.Mul(x, x)


def _and(a: Any, b: Any) -> Any:
    if (a.dtype, b.dtype) != (ir.DataType.BOOL, ir.DataType.BOOL):
        raise TypeError("bits of numbers are taken apart")  # by `_export`
    return _onnx.And(a, b)


def _same(x: Any) -> Any:
    return _onnx.Identity(x)


_TRANSLATIONS: _Translations = {
    torch.ops.pleexport.rotate.default: _rotate,
    torch.ops.pleexport.write_cache.default: _write_cache,
    torch.ops.pleexport.attend_window.default: _attend_window,
    torch.ops.pleexport.attend_context.default: _attend(_attend_context_op),
    torch.ops.pleexport.linear_in_steps.default: _linear_in_steps,
    torch.ops.pleexport.wkv7.default: _wkv7,
}
# What torch would take apart.
_OF_TORCH: _Translations = {
    torch.ops.aten.rms_norm.default: _rms_norm,
    torch.ops.aten.to.dtype: _to,
    torch.ops.aten.square.default: _square,
    torch.ops.aten.__and__.Tensor: _and,
    torch.ops.aten.detach_.default: _same,
}
_ON_GPU: _Translations = {
    torch.ops.pleexport.write_cache.default: _keep_written,
    torch.ops.pleexport.attend_context.default: _attend(_attend_cache_op),
}
