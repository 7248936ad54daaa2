"""RWKV bundles against the plain reference, and the reference's own witness beside it."""

from __future__ import annotations

import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SAMPLES, check_every_way_to_feed, exact_bundle
from rwkv_checkpoints import VARIANTS, rwkv, rwkv_tensors
from safetensors.torch import save_file

import pleexport
from pleexport import families
from pleexport.checkpoint.checkpoint import Checkpoint
from pleexport.checkpoint.matching import MatchedModel
from pleexport.errors import CheckpointError, InputError, UnsupportedError
from pleexport.parity.oracle import StepOracle
from pleexport.references.rwkv import RwkvReference

UNEVEN: dict[str, Any] = {
    "vocab": 61,
    "width": 60,
    "layers": 2,
    "head_size": 12,
    "ffn": 77,
    "decay_rank": 7,
    "rate_rank": 5,
    "value_rank": 3,
    "gate_rank": 9,
    "de_rank": 6,
    "dea_width": 20,
    "dea_rank": 11,
}


PUBLISHED = pytest.param({}, id="published", marks=pytest.mark.slow)


@pytest.mark.parametrize("sizes", [PUBLISHED, pytest.param(UNEVEN, id="uneven")])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_agree_with_the_reference(variant: Any, sizes: Any, tmp_path: Path) -> None:
    path = rwkv(tmp_path / "model.pth", variant, **sizes)
    oracle = StepOracle(RwkvReference(rwkv_tensors(variant, **sizes)))
    check_every_way_to_feed(exact_bundle(path, tmp_path / "bundle"), oracle.logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "variant",
    [v if v in ("7a", "8") else pytest.param(v, marks=pytest.mark.slow) for v in VARIANTS],
)
def test_half_precision_is_widened_before_anything_is_computed(
    variant: Any, dtype: torch.dtype, tmp_path: Path
) -> None:
    path = rwkv(tmp_path / "model.pth", variant, dtype=dtype, **UNEVEN)
    oracle = StepOracle(RwkvReference(rwkv_tensors(variant, dtype=dtype, **UNEVEN)))
    check_every_way_to_feed(exact_bundle(path, tmp_path / "bundle"), oracle.logits)


@pytest.mark.parametrize(
    "variant",
    [v if v == "7a" else pytest.param(v, marks=pytest.mark.slow) for v in VARIANTS],
)
def test_a_build_passes_parity_also_when_rounded(variant: Any, tmp_path: Path) -> None:
    path = rwkv(tmp_path / "model.pth", variant, **UNEVEN)
    for options in (
        {"weight_dtype": "fp32", "table_dtype": "source"},
        {"weight_dtype": "int8", "table_dtype": "int8", "cache_dtype": "fp16"},
    ):
        bundle = pleexport.build(path, tmp_path / "bundle", overwrite=True, context=512, **options)
        assert bundle.manifest.parity.passed
    assert bundle.manifest.family == {"8": "rwkv8", "8-hybrid": "rwkv8-hybrid"}.get(
        variant, f"rwkv{variant}"
    )


def digests(bundle: pleexport.Bundle) -> tuple[str, str]:
    """Of the tables that a bundle was made from, and of its weights."""
    return bundle.manifest.tables_digest, bundle.decoder.weights_digest


def test_a_safetensors_file_is_the_same_model(tmp_path: Path) -> None:
    pth = rwkv(tmp_path / "model.pth", "7b", **UNEVEN)
    save_file(rwkv_tensors("7b", **UNEVEN), tmp_path / "model.safetensors")
    bundles = [
        exact_bundle(path, tmp_path / f"bundle{i}")
        for i, path in enumerate((pth, tmp_path / "model.safetensors"))
    ]
    first, second = (digests(bundle) for bundle in bundles)
    assert first == second


def test_computed_rows_do_not_depend_on_what_else_is_asked_for(tmp_path: Path) -> None:
    checkpoint = Checkpoint(rwkv(tmp_path / "model.pth", "7b", **UNEVEN | {"vocab": 150}))
    matched = MatchedModel(families.resolve(checkpoint), checkpoint)
    for table in matched.model.tables:
        whole = matched.rows(table, slice(0, 150))
        assert whole.shape == (150, table.row_width)
        for part in (slice(0, 1), slice(63, 130), slice(149, 150)):
            np.testing.assert_array_equal(matched.rows(table, part), whole[part])
        some = np.array([149, 3, 64, 3])
        np.testing.assert_array_equal(matched.rows(table, some), whole[some])


def test_a_folder_with_one_pth_is_enough(tmp_path: Path) -> None:
    rwkv(tmp_path / "folder" / "model.pth", "7a", **UNEVEN)
    assert pleexport.inspect(tmp_path / "folder").family == "rwkv7a"
    rwkv(tmp_path / "folder" / "other.pth", "7a", **UNEVEN)
    with pytest.raises(CheckpointError, match=r"holds 2 \.pth files"):
        Checkpoint(tmp_path / "folder")


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    path = tmp_path / "model.pth"
    torch.save(rwkv_tensors("7a", **UNEVEN) | {"evil": Evil()}, path)
    with pytest.raises(CheckpointError, match="holds more than tensors"):
        Checkpoint(path)
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError):
        Checkpoint(path)
    assert not (tmp_path / "ran").exists()


def test_a_compressed_archive_is_refused_before_it_unpacks(tmp_path: Path) -> None:
    path = rwkv(tmp_path / "model.pth", "7a", **UNEVEN)
    Checkpoint(path)  # the control
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    first = next(name for name in parts if "/data/" in name)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in parts.items():
            packed = zipfile.ZIP_DEFLATED if name == first else zipfile.ZIP_STORED
            archive.writestr(name, content, packed)
    with pytest.raises(CheckpointError, match=f"`{first}` in it is compressed, so it cannot be"):
        Checkpoint(path)


def test_a_tensor_that_is_larger_than_what_is_stored_is_refused(tmp_path: Path) -> None:
    tensors = rwkv_tensors("7a", **UNEVEN)
    huge = torch.zeros(1, 1).expand(1 << 20, 1 << 20)
    torch.save(tensors | {"head.weight": huge}, tmp_path / "model.pth")
    with pytest.raises(
        CheckpointError,
        match=r"`head\.weight` of shape .* needs 4,398,046,511,104 bytes, and 4 are",
    ):
        Checkpoint(tmp_path / "model.pth")


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch calls some of its layouts new
def test_odd_tensors_get_one_sentence(tmp_path: Path) -> None:
    tensors = rwkv_tensors("7a", **UNEVEN)
    matrix = tensors["head.weight"]
    for odd in (
        matrix.to_sparse_csr(),
        matrix.int(),
        torch.empty(matrix.shape, device="meta"),
        torch.nested.nested_tensor([matrix]),
    ):
        torch.save(tensors | {"head.weight": odd}, tmp_path / "model.pth")
        with pytest.raises(CheckpointError, match=r"`head\.weight` is not a plain"):
            Checkpoint(tmp_path / "model.pth")
    torch.save({"state": tensors}, tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match="not a map from names to tensors"):
        Checkpoint(tmp_path / "model.pth")
    with zipfile.ZipFile(tmp_path / "model.pth", "w") as archive:
        archive.writestr("model/data.pkl", b"")
    with pytest.raises(CheckpointError, match=r"model\.pth"):
        Checkpoint(tmp_path / "model.pth")
    odd_rank = tensors | {f"blocks.{i}.ffn.s1": torch.zeros(60, 7) for i in range(2)}
    torch.save(odd_rank, tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match="no matrix of 7 x 7"):
        pleexport.inspect(tmp_path / "model.pth")


def test_a_matrix_stored_the_other_way_round_in_memory_is_read(tmp_path: Path) -> None:
    tensors = rwkv_tensors("7a", **UNEVEN)
    plain = exact_bundle(rwkv(tmp_path / "model.pth", "7a", **UNEVEN), tmp_path / "plain")
    turned = {k: t.t().contiguous().t() if t.ndim == 2 else t for k, t in tensors.items()}
    torch.save(turned, tmp_path / "turned.pth")
    bundle = exact_bundle(tmp_path / "turned.pth", tmp_path / "bundle")
    assert digests(bundle) == digests(plain)


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    path = rwkv(tmp_path / "model.pth", "7a", **UNEVEN)
    tokenizer = SAMPLES / "gemma4-kjv" / "tokenizer.json"
    with pytest.raises(InputError, match="the model knows 0 to 60"):
        pleexport.build(path, tmp_path / "bundle", tokenizer=tokenizer)
    assert not (tmp_path / "bundle").exists()


def test_only_the_tokenizer_comes_from_where_it_is_asked_for(tmp_path: Path) -> None:
    sample, other = SAMPLES / "gemma4-kjv", tmp_path / "tokenizer"
    shutil.copytree(sample, other)
    (other / "generation_config.json").write_text('{"eos_token_id": 7}', encoding="utf-8")
    (other / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    bundle = pleexport.build(sample, tmp_path / "bundle", tokenizer=other, verify=False)
    own = (sample / "generation_config.json").read_bytes()
    assert (bundle.path / "generation_config.json").read_bytes() == own
    assert (bundle.path / "chat_template.jinja").exists()


@pytest.mark.parametrize("size", [0, 1, 1000, 100_000])
def test_a_truncated_file_is_refused(size: int, tmp_path: Path) -> None:
    path = rwkv(tmp_path / "model.pth", "7a", **UNEVEN)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"model\.pth"):
        Checkpoint(path)


def test_every_tensor_is_accounted_for(tmp_path: Path) -> None:
    tensors = rwkv_tensors("7a", **UNEVEN)
    info = pleexport.inspect(rwkv(tmp_path / "model.pth", "7a", **UNEVEN))
    assert info.weights == "found", info.notes
    assert info.counts.stored == sum(t.numel() for t in tensors.values())
    torch.save(tensors | {"blocks.0.att.new": torch.zeros(3)}, tmp_path / "more.pth")
    with pytest.raises(CheckpointError, match=r"`blocks\.0\.att\.new` is used by nothing"):
        pleexport.build(tmp_path / "more.pth", tmp_path / "bundle")
    del tensors["blocks.1.ffn.s2"]
    torch.save(tensors, tmp_path / "less.pth")
    with pytest.raises(CheckpointError, match=r"blocks\.1\.ffn\.s2"):
        pleexport.build(tmp_path / "less.pth", tmp_path / "bundle")


def test_plain_rwkv_has_nothing_to_split_off(tmp_path: Path) -> None:
    tensors = {k: t for k, t in rwkv_tensors("7a", **UNEVEN).items() if ".s" not in k}
    torch.save(tensors, tmp_path / "model.pth")
    with pytest.raises(UnsupportedError, match="no DeepEmbed tables"):
        pleexport.inspect(tmp_path / "model.pth")


def test_a_prompt_may_be_fed_in_any_pieces_and_texts_do_not_mix(tmp_path: Path) -> None:
    runner = pleexport.Runner(
        exact_bundle(rwkv(tmp_path / "model.pth", "7b", **UNEVEN), tmp_path / "bundle")
    )
    ids = np.random.default_rng(2).integers(0, 61, 70).tolist()
    alone = runner.logits(ids)
    runner.logits(ids[::-1])
    np.testing.assert_array_equal(runner.logits(ids), alone)


@pytest.mark.parametrize(("factor", "is_finite"), [(1e30, True), (3e38, False)])
def test_rows_that_overflow_are_refused_and_nothing_is_warned_of(
    factor: float, is_finite: bool, tmp_path: Path
) -> None:
    path = rwkv(tmp_path / "model.pth", "7a", **UNEVEN)
    tensors = torch.load(path)
    embedding = tensors["emb.weight"]
    # Rows whose squares are infinite become 0; those whose sum is too are no numbers.
    tensors["emb.weight"] = torch.sign(embedding.float()).abs() * factor
    tensors["emb.weight"][:, ::2] *= 0.9
    torch.save(tensors, path)
    checkpoint = Checkpoint(path)
    matched = MatchedModel(families.resolve(checkpoint), checkpoint)
    (table,) = (t for t in matched.model.tables if t.name == "emb")
    if is_finite:
        assert np.isfinite(matched.row_values(table, slice(None))).all()
    else:
        with pytest.raises(CheckpointError, match=r"computed from `emb\.weight` are not finite"):
            matched.row_values(table, slice(None))
