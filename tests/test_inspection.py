"""Inspection: counts to the digit, from configs and headers alone."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from checkpoints import gemma4

from pleexport import families, targets
from pleexport.backends.onnx.storage import OnnxStorage
from pleexport.dtypes import TABLE_DTYPES
from pleexport.errors import CheckpointError, UnsupportedError
from pleexport.export.plan import cache_bytes
from pleexport.inspection.estimates import estimate
from pleexport.inspection.info import ModelInfo, TextInfo
from pleexport.inspection.inspect import inspect
from pleexport.show.inspection import describe_model
from pleexport.weights import WeightRequest

PREFIX = "model.language_model."
SIZES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8}


def _layer_types(layers: int, period: int) -> list[str]:
    return ["sliding_attention" if (i + 1) % period else "full_attention" for i in range(layers)]


def gemma4_text(**changes: Any) -> dict[str, Any]:
    """The text part of Gemma 4 E2B's config."""
    config: dict[str, Any] = {
        "model_type": "gemma4_text",
        "hidden_size": 1536,
        "num_hidden_layers": 35,
        "layer_types": _layer_types(35, 5),
        "intermediate_size": 6144,
        "use_double_wide_mlp": True,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "global_head_dim": 512,
        "num_kv_shared_layers": 20,
        "vocab_size": 262_144,
        "vocab_size_per_layer_input": 262_144,
        "hidden_size_per_layer_input": 256,
        "sliding_window": 512,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {
                "rope_type": "proportional",
                "rope_theta": 1e6,
                "partial_rotary_factor": 0.25,
            },
        },
        "final_logit_softcapping": 30.0,
        "max_position_embeddings": 131_072,
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
        "tie_word_embeddings": True,
    }
    return config | changes


E4B = {
    "hidden_size": 2560,
    "num_hidden_layers": 42,
    "layer_types": _layer_types(42, 6),
    "intermediate_size": 10_240,
    "use_double_wide_mlp": False,
    "num_key_value_heads": 2,
    "num_kv_shared_layers": 18,
}
TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "layer_types": _layer_types(4, 2),
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "head_dim": 8,
    "global_head_dim": 16,
    "num_kv_shared_layers": 2,
    "vocab_size": 50,
    "vocab_size_per_layer_input": 40,
    "hidden_size_per_layer_input": 8,
    "sliding_window": 8,
    "max_position_embeddings": 64,
}


# The rules of the published quantization-aware checkpoints: bits by name of a module.
_MOBILE = {
    r"^lm_head$": 2,
    r"language_model\.embed_tokens$": 2,
    r"per_layer_input_gate$": 8,
    r"per_layer_projection$": 8,
    r"self_attn\.": 4,
}
MOBILE_E2B = _MOBILE | {
    r"language_model\.embed_tokens_per_layer$": 4,
    r"language_model\.layers\.(\d|1[0-4])\.mlp\.": 4,
    r"language_model\.layers\.\d+\.mlp\.": 2,
}
MOBILE_E4B = _MOBILE | {
    r"language_model\.embed_tokens_per_layer$": 2,
    r"language_model\.layers\.\d+\.mlp\.": 4,
}


def gemma3n_text(*, layers: int, intermediate: int, shared: int) -> dict[str, Any]:
    return {
        "model_type": "gemma3n_text",
        "hidden_size": 2048,
        "num_hidden_layers": layers,
        "layer_types": _layer_types(layers, 5),
        "intermediate_size": [intermediate] * layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "num_kv_shared_layers": shared,
        "vocab_size": 262_400,
        "vocab_size_per_layer_input": 262_144,
        "hidden_size_per_layer_input": 256,
        "sliding_window": 512,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "activation_sparsity_pattern": [0.95] * 10 + [0.0] * (layers - 10),
        "altup_num_inputs": 4,
        "altup_active_idx": 0,
        "altup_coef_clip": 120.0,
        "altup_correct_scale": True,
        "laurel_rank": 64,
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-6,
        "final_logit_softcapping": 30.0,
        "max_position_embeddings": 32_768,
    }


def write_config(folder: Path, text: dict[str, Any], **extra: Any) -> Path:
    folder.mkdir(exist_ok=True)
    model_type = text["model_type"].removesuffix("_text")
    config = {"model_type": model_type, "dtype": "bfloat16", "text_config": text} | extra
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def expected_shapes(folder: Path, *, dead: bool = True) -> dict[str, tuple[int, ...]]:
    """All tensors of the text part, as a published checkpoint has them."""
    config = json.loads((folder / "config.json").read_text())
    model = families.from_config(config, dtype="bf16")
    shapes = {PREFIX + k: shape for t in model.tables for k, shape in t.sources.items()}
    shapes |= {PREFIX + w.source_key: w.shape for w in model.weights if w.constant is None}
    if dead:
        unused = {key: u.shape for key, u in model.unused.items() if key != "lm_head.weight"}
        shapes |= {PREFIX + key: shape for key, shape in unused.items()}
    return shapes


def write_weights(
    folder: Path, shapes: dict[str, tuple[int, ...]], dtype: str = "BF16", **dtypes: str
) -> None:
    """A valid file whose data is a hole: it takes no space on disk, whatever its size."""
    header, position = {}, 0
    for name, shape in shapes.items():
        own = dtypes.get(name.rpartition(PREFIX)[2].partition(".")[0], dtype)
        end = position + math.prod(shape) * SIZES[own]
        header[name] = {"dtype": own, "shape": shape, "data_offsets": [position, end]}
        position = end
    raw = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + position)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_config(tmp_path / "tiny", gemma4_text(**TINY))


def _flat(info: ModelInfo) -> str:
    return " ".join(describe_model(info).split())


@pytest.mark.parametrize(
    ("changes", "text", "main", "per_layer", "dead", "buffers", "resident"),
    [
        ({}, 4_628_569_344, 402_653_184, 2_348_810_240, 18_880_512, 35, 2_279_759_104),
        (E4B, 7_463_013_376, 671_088_640, 2_818_572_288, 55_055_616, 42, 4_644_441_088),
    ],
    ids=["E2B", "E4B"],
)
def test_counts_of_gemma4_from_config(
    tmp_path: Path,
    changes: dict[str, Any],
    text: int,
    main: int,
    per_layer: int,
    dead: int,
    buffers: int,
    resident: int,
) -> None:
    counts = inspect(write_config(tmp_path / "m", gemma4_text(**changes))).counts
    assert (counts.text, counts.live) == (text, text)
    assert (counts.main_embedding, counts.per_layer_embedding) == (main, per_layer)
    assert (counts.dead, counts.buffers, counts.resident) == (dead, buffers, resident)
    assert counts.dense == text - main - per_layer
    assert counts.stored == text + dead + buffers
    assert (counts.towers, counts.head_copies, counts.scalars) == (0, 0, 0)


@pytest.mark.parametrize(
    ("shape", "text", "per_layer", "core", "effective", "label", "published"),
    [
        (
            {"layers": 30, "intermediate": 8192, "shared": 10},
            4_435_182_688,
            2_013_265_920,
            1_884_521_568,
            1_905_495_648,
            "1.91B",
            '"1.91B effective"',
        ),
        (
            {"layers": 35, "intermediate": 16_384, "shared": 15},
            6_835_235_568,
            2_348_810_240,
            3_949_030_128,
            3_980_491_248,
            "3.98B",
            '"about 4B effective"',
        ),
    ],
    ids=["E2B", "E4B"],
)
def test_counts_of_gemma3n_from_config(
    tmp_path: Path,
    shape: dict[str, int],
    text: int,
    per_layer: int,
    core: int,
    effective: int,
    label: str,
    published: str,
) -> None:
    info = inspect(write_config(tmp_path / "m", gemma3n_text(**shape)))
    counts = info.counts
    assert (counts.text, counts.dense) == (text, core)
    assert (counts.main_embedding, counts.per_layer_embedding) == (537_395_200, per_layer)
    assert (info.effective.parameters, info.effective.label) == (effective, label)
    assert counts.dead == effective - core
    assert published in _flat(info)


@pytest.mark.parametrize(
    ("changes", "projections", "stored", "live", "effective", "words"),
    [
        (
            {},
            3_538_944,
            5_123_178_051,
            5_104_297_504,
            2_371_714_627,
            ("2.3B: 5.1B stored minus 2.8B embedding", "2.8B of 5.1B = 55%", "(2.37B)", "53.7%"),
        ),
        (
            E4B,
            5_898_240,
            7_996_156_490,
            7_941_100_832,
            4_506_495_562,
            ("4.5B: 8.0B stored minus 3.5B embedding", "3.5B of 8.0B = 44%", "(4.51B)", "43.6%"),
        ),
    ],
    ids=["E2B", "E4B"],
)
def test_counts_of_published_gemma4_with_towers(
    tmp_path: Path,
    changes: dict[str, Any],
    projections: int,
    stored: int,
    live: int,
    effective: int,
    words: tuple[str, ...],
) -> None:
    folder = write_config(tmp_path / "m", gemma4_text(**changes))
    towers: dict[str, tuple[int, ...]] = {
        "model.vision_tower.weight": (167_364_608,),
        "model.audio_tower.weight": (304_824_608,),
        "model.embed_vision.embedding_projection.weight": (projections // 2,),
        "model.embed_audio.embedding_projection.weight": (projections // 2,),
    }
    scalars = {f"model.audio_tower.{i}.input_max": () for i in range(928)}
    write_weights(folder, expected_shapes(folder) | towers | scalars)
    info = inspect(folder)
    assert info.weights == "found"
    assert (info.counts.stored, info.counts.live, info.counts.scalars) == (stored, live, 928)
    assert (info.effective.parameters, info.effective.published_name) == (effective, None)
    assert [(tower.name, tower.parameters) for tower in info.towers[:2]] == [
        ("vision tower", 167_364_608),
        ("audio tower", 304_824_608),
    ]
    assert info.towers[1].nbytes == 2 * (304_824_608 + 928)
    text = _flat(info)
    for word in (*words, "stores", "as this one does", "build: 609.65 MB", "928 tensors without"):
        assert word in text


def test_config_alone_prints_the_published_figure(tmp_path: Path) -> None:
    info = inspect(write_config(tmp_path / "m", gemma4_text()))
    assert info.weights == "none"
    assert (info.effective.label, info.effective.published_name) == ("2.3B", "Gemma 4 E2B")
    assert info.effective.parameters == 2_371_714_627
    text = _flat(info)
    for word in (
        "2.3B, as published for Gemma 4 E2B: 5.1B stored minus 2.8B embedding",
        "5,123,178,051 stored minus 2,751,463,424 embedding = 2,371,714,627 (2.37B)",
        "the same rule gives 1.8B for the 4,647,449,891 parameters of the text part",
        "No weights in the folder",
        "vision and audio towers included",
    ):
        assert word in text


def test_other_shape_has_no_published_note(tiny: Path) -> None:
    info = inspect(tiny)
    assert "Published figures" not in _flat(info)
    assert info.effective.label == f"{info.effective.parameters:,}"


def test_text_only_weights_fit(tiny: Path) -> None:
    write_weights(tiny, expected_shapes(tiny))
    with_weights = inspect(tiny)
    (tiny / "model.safetensors").unlink()
    config_only = inspect(tiny)
    assert with_weights.weights == "found"
    assert with_weights.counts == config_only.counts
    assert with_weights.notes == []


def test_weights_without_dead_tensors_store_less(tiny: Path) -> None:
    config_only = inspect(tiny).counts
    write_weights(tiny, expected_shapes(tiny, dead=False))
    counts = inspect(tiny).counts
    assert (counts.dead, counts.text) == (0, config_only.text)
    assert counts.stored == config_only.stored - config_only.dead


def test_copy_of_a_tied_head_is_counted_apart(tiny: Path) -> None:
    config_only = inspect(tiny).counts
    write_weights(tiny, expected_shapes(tiny) | {"lm_head.weight": (50, 16)})
    info = inspect(tiny)
    assert (info.counts.head_copies, info.counts.dead) == (800, config_only.dead)
    assert info.counts.stored == config_only.stored + 800
    assert "unused copy of the head" in describe_model(info)


def test_untied_head_lets_the_main_embedding_leave(tmp_path: Path) -> None:
    text = gemma4_text(**TINY, tie_word_embeddings=False)
    info = inspect(write_config(tmp_path / "m", text))
    assert info.counts.resident == info.counts.dense
    assert not any(table.is_head for table in info.tables)
    assert "and the main embedding, 800, which is not the head" in _flat(info)


def test_weights_that_do_not_fit_become_a_note(tiny: Path) -> None:
    config_only = inspect(tiny)
    shapes = expected_shapes(tiny)
    shapes[PREFIX + "norm.weight"] = (17,)
    shapes[PREFIX + "surprise"] = (3,)
    write_weights(tiny, shapes)
    info = inspect(tiny)
    assert info.weights == "unusable"
    assert info.counts == config_only.counts
    text = _flat(info)
    assert "The weights do not fit the model, so a build would be refused" in text
    assert "norm.weight` has shape [17]; the model has [16]" in text
    assert "surprise` is used by nothing" in text


def test_table_sizes_count_scales(tmp_path: Path) -> None:
    info = inspect(write_config(tmp_path / "m", gemma4_text()))
    main, per_layer = info.tables
    assert [stored.dtype for stored in main.stored] == list(TABLE_DTYPES)
    assert [s.row_bytes for s in main.stored] == [3072, 6144, 3072, 3072, 1560, 864]
    assert [s.row_bytes for s in per_layer.stored] == [17_920, 35_840, 17_920, 17_920, 9100, 5040]
    assert per_layer.stored[0].table_bytes == 4_697_620_480
    assert per_layer.stored[0].segment_dtype == "bf16"
    assert [blob.row_stride for blob in info.blobs] == [
        21_056,
        42_048,
        21_056,
        21_056,
        10_688,
        5952,
    ]
    for blob in info.blobs:
        assert blob.file_bytes > 262_144 * blob.row_stride


def test_tensors_in_another_dtype_than_the_configs_are_noted(tiny: Path) -> None:
    write_weights(tiny, expected_shapes(tiny), dtype="F32")
    info = inspect(tiny)
    assert info.tables[0].stored[0].segment_dtype == "bf16"
    assert "config.json says bfloat16, and the tables are stored as fp32" in _flat(info)


@pytest.mark.parametrize(
    ("changes", "rules", "bundle", "read", "feed_forward", "table", "web"),
    [
        ({}, MOBILE_E2B, 2.163e9, 0.837e9, {("int4", 15), ("int2", 20)}, "int4", (2.492e9, True)),
        # In 8 bits its matrices are more than WebAssembly can address.
        (E4B, MOBILE_E4B, 3.204e9, 2.281e9, {("int4", 42)}, "int2", (3.295e9, False)),
    ],
    ids=["E2B", "E4B"],
)
def test_published_mobile_checkpoints_are_known_from_their_config(
    changes: dict[str, Any],
    rules: dict[str, int],
    bundle: float,
    read: float,
    feed_forward: set[tuple[str, int]],
    table: str,
    web: tuple[float, bool],
    tmp_path: Path,
) -> None:
    quantization = {
        "quant_method": "gemma",
        "num_bits": 4,
        "quantize_embeddings": True,
        "module_quant_configs": {pattern: {"num_bits": bits} for pattern, bits in rules.items()},
        "modules_to_not_convert": ["per_layer_model_projection"],
    }
    text = gemma4_text(**changes, tie_word_embeddings=False)
    info = inspect(write_config(tmp_path / "m", text, quantization_config=quantization))
    for target in info.targets:  # on every target, the checkpoint's own codes
        assert (target.table_dtype, target.weight_dtype) == ("source", "source")
        if target.target == "web":
            assert target.bundle_bytes == pytest.approx(web[0], rel=1e-3)
            assert target.fits == web[1]
            continue
        assert target.bundle_bytes == pytest.approx(bundle, rel=1e-3)
        assert target.read_bytes == pytest.approx(read, rel=1e-3)
        assert target.fits
        parts = {part.name: part for part in target.parts}
        assert parts["embed_tokens_per_layer"].dtype == table
        assert parts["embed_tokens"].dtype == parts["lm_head"].dtype == "int2"
        assert parts["per_layer_input_gate"].dtype == "int8"
        found = {(p.dtype, p.count) for p in target.parts if p.name == "mlp.down_proj"}
        assert found == feed_forward


def test_estimate_uses_the_exporters_sizes(tmp_path: Path) -> None:
    folder = write_config(tmp_path / "m", gemma4_text())
    info = inspect(folder)
    model = families.from_config(json.loads((folder / "config.json").read_text()), dtype="bf16")
    ios = next(e for e in info.targets if e.target == "ios")
    storage = OnnxStorage(WeightRequest("int4"))
    weights = sum(storage.file_bytes(w) for w in model.weights)
    # The head has a file of its own: a page for its header, and checksums of its rows.
    assert ios.graph_bytes == weights + 16_384 + 8 * 262_144
    # The input embedding is in it, and not in the blob.
    saved = info.blobs[TABLE_DTYPES.index("int8")].file_bytes - ios.blob_bytes
    assert 262_144 * (10_688 - 9152) <= saved < 402_700_000
    assert ios.bundle_bytes == ios.graph_bytes + ios.blob_bytes
    assert ios.resident_bytes == weights + ios.cache_bytes
    assert ios.fits
    android = next(e for e in info.targets if e.target == "android")
    assert "2 parts of at most 1.50 GB" in android.delivery[0]


def test_cache_bytes_stop_at_the_window(tmp_path: Path) -> None:
    folder = write_config(tmp_path / "m", gemma4_text())
    model = families.from_config(json.loads((folder / "config.json").read_text()), dtype="bf16")
    sliding, full = 12 * 2 * 256 * 4, 3 * 2 * 512 * 4
    assert cache_bytes(model.with_cache("fp32"), 100) == 100 * (sliding + full)
    assert cache_bytes(model.with_cache("fp32"), 4096) == 512 * sliding + 4096 * full
    assert cache_bytes(model.with_cache("fp16"), 4096) == 512 * sliding + 4096 * full // 2
    scales = 3 * 2 * 4
    assert cache_bytes(model.with_cache("int8"), 4096) == 512 * sliding + 4096 * (
        full // 4 + scales
    )


def test_estimate_that_does_not_fit_says_the_number(tmp_path: Path) -> None:
    folder = write_config(tmp_path / "m", gemma4_text())
    model = families.from_config(json.loads((folder / "config.json").read_text()), dtype="bf16")
    limits = targets.Limits(largest_file_bytes=2_000_000_000, memory_budget_bytes=1_000_000_000)
    small = msgspec.structs.replace(
        targets.load("web"), limits=limits, weight_dtype="int4", per_channel=False
    )
    result = estimate(model, small, "bf16")
    assert not result.fits
    assert result.problems == [
        "`embeddings.safetensors` has 2.40 GB, and the largest file is 2.00 GB",
        "1.44 GB have to stay in memory, and the budget is 1.00 GB",
    ]
    info = msgspec.structs.replace(inspect(folder), targets=[result])
    text = _flat(info)
    assert "web does not fit: 1.44 GB have to stay in memory, and the budget is 1.00 GB." in text
    assert " NO " in text


def test_estimate_caps_the_context(tiny: Path) -> None:
    assert {e.context for e in inspect(tiny).targets} == {64}


@pytest.mark.parametrize("changes", [{}, E4B, TINY], ids=["E2B", "E4B", "tiny"])
def test_render_fits_a_hundred_columns(tmp_path: Path, changes: dict[str, Any]) -> None:
    text = describe_model(inspect(write_config(tmp_path / "m", gemma4_text(**changes))))
    lines = text.splitlines()[1:]
    assert max(map(len, lines)) <= 100
    assert not any(line.endswith(" ") or "\u00a0" in line for line in lines)


def test_info_is_json(tiny: Path) -> None:
    info = inspect(tiny)
    assert msgspec.json.decode(msgspec.json.encode(info), type=ModelInfo) == info
    assert json.dumps(msgspec.to_builtins(info))


def test_inspect_needs_no_torch(tiny: Path) -> None:
    program = (
        "import sys; from pleexport.inspection.inspect import inspect; "
        "from pleexport.show.inspection import describe_model; "
        "describe_model(inspect(sys.argv[1])); "
        "print(sorted({'torch', 'transformers', 'onnx'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, str(tiny)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert result.stdout == "[]\n"


def test_inspect_missing_folder_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere` does not exist"):
        inspect(tmp_path / "nowhere")


def test_inspect_model_without_tables_says_so(tmp_path: Path) -> None:
    text = gemma4_text(hidden_size_per_layer_input=0)
    with pytest.raises(UnsupportedError, match="no per-layer embedding tables"):
        inspect(write_config(tmp_path / "m", text))


# Text.


def test_inspect_says_what_text_is_made_with(tmp_path: Path) -> None:
    folder = gemma4(tmp_path / "checkpoint")
    info = inspect(folder)
    assert info.text == TextInfo(tokenizer=None, tokens=0, added_tokens=[], chat_template=None)
    tokenizer = {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": 1, "content": "b"}]}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = {"added_tokens_decoder": {"2": {"content": "<tool>"}, "3": {"content": "a"}}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.json").write_text('{"chat_template": "x"}')
    generation = {"do_sample": True, "top_k": 64, "num_beams": 3}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    info = inspect(folder)
    assert info.text.tokenizer == "tokenizer.json"
    assert info.text.tokens == 2
    assert info.text.added_tokens == ["<tool>"]
    assert info.text.chat_template == "chat_template.json"
    assert info.generation == {"do_sample": True, "temperature": 1.0, "top_k": 64}
    assert any("`num_beams` of generation_config.json is not obeyed" in n for n in info.notes)
    shown = describe_model(info)
    assert "tokenizer      tokenizer.json, 2 tokens\n  added tokens   1: '<tool>'" in shown
    assert "generation     sampling, temperature 1.0, top_k 64" in shown
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "generation_config.json").write_text('{"top_k": -1}')
    (folder / "tokenizer.json").write_text("[" * 100_000)
    info = inspect(folder)
    assert info.text.chat_template == "chat_template.jinja"
    assert any("top_k is -1; it must be 0 or more" in note for note in info.notes)
