"""Checkpoints that lie elsewhere: what is fetched, what is kept, and what is said."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import huggingface_hub.constants as hub_constants
import pytest
import torch
import xxhash
from adapter_folders import MLP, rewrite_config, save_adapter
from checkpoints import gemma4, gemma4_multimodal
from hub_server import COMMIT, Hub, serve
from safetensors.torch import load_file, save_file

import pleexport
from pleexport.checkpoint import remote
from pleexport.checkpoint.checkpoint import Checkpoint
from pleexport.checkpoint.remote import find_remote
from pleexport.errors import CheckpointError, MissingDependencyError, UnsupportedError
from pleexport.progress import Progress
from pleexport.runtime.bundle import SourceFile
from pleexport.show.bundle import describe_bundle

QUIET = Progress(quiet=True)
NEEDED = {"config.json", "tokenizer.json", "chat_template.jinja", "LICENSE", "model.safetensors"}
OTHERS = {"README.md", "model.gguf", "onnx/model.onnx", "pytorch_model.bin", "optimizer.pt"}


def write(folder: Path, names: set[str]) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(
            b'["%s"]' % name.encode() if name.endswith("json") else name.encode() * 100
        )
    return folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with one model, and an empty cache; the working folder is empty too."""
    folder = write(tmp_path / "served", NEEDED | OTHERS)
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub_constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with serve(Hub({"org/model": folder})) as served:
        monkeypatch.setattr(hub_constants, "ENDPOINT", served.url)
        monkeypatch.setattr(
            hub_constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            served.url + "/{repo_id}/resolve/{revision}/{filename}",
        )
        yield served


def fetched(checkpoint: str, *, weights: bool = True, **options: Any) -> Path:
    found = find_remote(checkpoint, **options)
    assert found is not None
    return found.fetch(QUIET, weights=weights)


def test_only_what_a_build_needs_is_fetched_and_only_once(hub: Hub) -> None:
    folder = fetched("org/model")
    assert hub.fetched == NEEDED
    assert {p.name for p in folder.iterdir()} == NEEDED
    assert (folder / "model.safetensors").read_bytes() == b"model.safetensors" * 100
    hub.sent.clear()
    assert fetched("org/model") == folder
    assert not hub.fetched


def test_without_weights_only_small_files_are_fetched(hub: Hub) -> None:
    fetched("org/model", weights=False)
    assert hub.fetched == NEEDED - {"model.safetensors"}


def test_a_folder_wins_over_an_id(hub: Hub) -> None:
    Path("org/model").mkdir(parents=True)
    assert find_remote("org/model") is None
    assert not hub.requests


def test_a_mistyped_path_is_not_looked_for_on_the_hub(hub: Hub) -> None:
    Path("org").mkdir()
    with pytest.raises(CheckpointError, match="`org/model` does not exist, though `org` does"):
        find_remote("org/model")
    assert find_remote("./org/model") is None
    assert find_remote("/org/model") is None
    assert find_remote("org/model/deeper") is None
    assert not hub.requests
    assert fetched("hf://org/model").is_dir()


@pytest.mark.parametrize(
    "written",
    ["org/model@v1", "hf://org/model@v1", "https://huggingface.co/org/model/tree/v1"],
)
def test_a_revision_may_stand_in_the_name(written: str, hub: Hub) -> None:
    assert fetched(written).name == COMMIT
    assert "GET api/models/org/model/revision/v1" in hub.requests


def test_a_revision_may_be_an_option(hub: Hub) -> None:
    assert fetched("org/model", revision="v1").name == COMMIT
    with pytest.raises(CheckpointError, match="`org/model` has no revision `v9`"):
        fetched("org/model", revision="v9")
    with pytest.raises(CheckpointError, match="names a revision already"):
        find_remote("org/model@v1", revision="v2")
    with pytest.raises(CheckpointError, match="is not of the Hugging Face hub"):
        find_remote(".", revision="v1")


def test_a_gated_model_needs_a_token(hub: Hub) -> None:
    hub.gated.add("org/model")
    with pytest.raises(CheckpointError, match="only by who has accepted its terms") as caught:
        fetched("org/model")
    assert "hf auth login" in (caught.value.hint or "")
    assert fetched("org/model", token=hub.token).is_dir()


def test_a_model_that_is_nowhere_is_said_so(hub: Hub) -> None:
    with pytest.raises(CheckpointError, match="no folder `org/none` here, and no model of this"):
        fetched("org/none")


def test_what_was_broken_off_goes_on_where_it_ended(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = bytes(range(256)) * 4096
    (hub.models["org/model"] / "model.safetensors").write_bytes(content)
    monkeypatch.setattr(hub_constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    hub.cut_after = 300_000
    folder = fetched("org/model")
    assert (folder / "model.safetensors").read_bytes() == content
    assert hub.sent["model.safetensors"] == len(content)


def test_offline_takes_what_is_cached_and_asks_nobody(hub: Hub) -> None:
    with pytest.raises(CheckpointError, match="is not in the cache, and the hub may not be asked"):
        fetched("org/model", offline=True)
    folder = fetched("org/model")
    hub.requests.clear()
    assert fetched("org/model", offline=True) == folder
    assert not hub.requests


def test_a_hub_that_cannot_be_reached_is_answered_from_the_cache(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fetched("org/model")
    monkeypatch.setattr(hub_constants, "ENDPOINT", "http://127.0.0.1:9")
    assert fetched("org/model") == folder
    with pytest.raises(CheckpointError, match="is not in the cache, and the hub cannot be reached"):
        fetched("org/other")


def test_what_does_not_fit_on_the_disk_is_not_begun(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = shutil.disk_usage(".")._replace(free=1 << 20)
    monkeypatch.setattr(remote.shutil, "disk_usage", lambda _: free)
    with pytest.raises(CheckpointError, match=r"has 1\.05 MB free; `http.*org/model` needs"):
        fetched("org/model")
    assert not hub.fetched


def test_shards_are_those_of_the_index(hub: Hub) -> None:
    folder = hub.models["org/model"]
    (folder / "model.safetensors").unlink()
    write(folder, {"a-1.safetensors", "a-2.safetensors", "unlisted.safetensors"})
    index = {"weight_map": {"x": "a-1.safetensors", "y": "a-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    fetched("org/model")
    assert {n for n in hub.fetched if n.endswith("s")} == {"a-1.safetensors", "a-2.safetensors"}


class Served(NamedTuple):
    names: set[str]
    message: str


@pytest.mark.parametrize(
    "case",
    [
        Served(
            {"config.json", "x.gguf", "y.onnx"}, "holds no safetensors weights, but .gguf, .onnx"
        ),
        Served({"config.json", "README.md"}, "/org/odd` holds no safetensors weights"),
        Served({"a.pth", "b.pth"}, "holds 2 weight files and no index: `a.pth`, `b.pth`"),
        Served({"model.safetensors.index.json"}, "of `http"),
    ],
    ids=lambda case: case.message,
)
def test_a_model_without_weights_that_are_read_is_refused(
    case: Served, hub: Hub, tmp_path: Path
) -> None:
    hub.models["org/odd"] = write(tmp_path / "odd", case.names)
    with pytest.raises(CheckpointError) as caught:
        fetched("org/odd")
    assert case.message in caught.value.message


def test_an_index_whose_shard_is_missing_is_refused(hub: Hub, tmp_path: Path) -> None:
    hub.models["org/odd"] = folder = write(tmp_path / "odd", {"config.json"})
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"x": "gone"}}')
    with pytest.raises(CheckpointError, match=r"lacks `gone`, which its `model\.safetensors"):
        fetched("org/odd")


def test_one_file_of_several_can_be_named(hub: Hub, tmp_path: Path) -> None:
    hub.models["org/odd"] = write(tmp_path / "odd", {"a.pth", "b.pth", "rwkv_vocab_v1.txt"})
    assert fetched("hf://org/odd/b.pth").name == "b.pth"
    assert hub.fetched == {"b.pth", "rwkv_vocab_v1.txt"}
    with pytest.raises(CheckpointError, match=r"has no file `c\.pth`"):
        fetched("hf://org/odd/c.pth")
    with pytest.raises(CheckpointError, match=r"`hf://odd` is no model's id"):
        find_remote("hf://odd")


# Builds of what lies on the hub.


def split_by_tower(folder: Path) -> set[str]:
    """Split the weights into a shard of the language model, and one of all else."""
    tensors = load_file(folder / "model.safetensors")
    shards: dict[str, dict[str, Any]] = {"text.safetensors": {}, "towers.safetensors": {}}
    for name, tensor in tensors.items():
        shards["text.safetensors" if "language_model" in name else "towers.safetensors"][name] = (
            tensor
        )
    weight_map = {name: file for file, part in shards.items() for name in part}
    for file, part in shards.items():
        save_file(part, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    return {name for name in tensors if "language_model" not in name}


def test_a_build_by_id_needs_no_tower_and_passes_parity(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.models["org/gemma"] = gemma4_multimodal(tmp_path / "gemma")
    (hub.models["org/gemma"] / "LICENSE").write_text("Do good.")
    (hub.models["org/gemma"] / "NOTICE.md").write_text("By us.")
    assert split_by_tower(hub.models["org/gemma"])
    exact = {"weight_dtype": "fp32", "table_dtype": "source"}
    bundle = pleexport.build("org/gemma", progress=Progress(), **exact)  # type: ignore[arg-type]
    assert bundle.path.name == "gemma-laptop"
    assert bundle.manifest.parity.passed
    assert (bundle.path / "LICENSE").read_text() == "Do good."
    assert (bundle.path / "NOTICE.md").read_text() == "By us."
    source = bundle.manifest.source
    assert source is not None
    assert (source.repository, source.commit) == ("org/gemma", COMMIT)
    shard = hub.models["org/gemma"] / "text.safetensors"
    assert source.files[-1] == SourceFile(
        "text.safetensors",
        shard.stat().st_size,
        f"xxh3-128:{xxhash.xxh3_128_hexdigest(shard.read_bytes())}",
    )
    assert f"built from org/gemma at {COMMIT}" in describe_bundle(bundle)
    assert [r for r in hub.requests if "api/models" in r] == [
        "GET api/models/org/gemma/revision/main"
    ]
    assert "text.safetensors" in hub.fetched
    assert "towers.safetensors" not in hub.fetched
    said = " ".join(capsys.readouterr().err.split())
    assert f"note: there is no `org/gemma` here; it is taken from {hub.url}/org/gemma" in said
    assert "`towers.safetensors` of `model.safetensors.index.json` is not there" in said
    report = pleexport.verify(bundle, checkpoint="org/gemma", offline=True)
    assert report is not None
    assert report.passed
    again = pleexport.build("org/gemma", "again", offline=True, verify=False, **exact)  # type: ignore[arg-type]
    assert again.manifest.source == source


def test_a_shard_of_the_language_model_has_to_be_there(tmp_path: Path) -> None:
    folder = gemma4_multimodal(tmp_path / "gemma")
    split_by_tower(folder)
    (folder / "text.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"text\.safetensors` does not exist"):
        Checkpoint(folder)


def test_a_model_that_cannot_be_built_is_refused_before_its_weights_are_fetched(
    hub: Hub, tmp_path: Path
) -> None:
    hub.models["org/bert"] = write(tmp_path / "bert", {"model.safetensors"})
    (hub.models["org/bert"] / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UnsupportedError, match="bert"):
        pleexport.build("org/bert")
    assert hub.fetched == {"config.json"}


def test_an_adapter_by_id_is_merged_into_its_base_by_id(hub: Hub, tmp_path: Path) -> None:
    base = hub.models["org/gemma"] = gemma4(tmp_path / "gemma", torch.float32)
    adapter = hub.models["org/lora"] = save_adapter(base, tmp_path / "lora", target_modules=MLP)
    rewrite_config(adapter, base_model_name_or_path="org/gemma")
    write(adapter, {"checkpoint-5/optimizer.safetensors"})
    (adapter / "config.json").write_bytes((base / "config.json").read_bytes())
    options = {"weight_dtype": "fp32", "table_dtype": "source"}
    bundle = pleexport.build("org/lora", **options)  # type: ignore[arg-type]
    assert bundle.path.name == "lora-laptop"
    assert bundle.manifest.parity.passed
    assert [record.name for record in bundle.manifest.adapters] == ["lora"]
    assert "adapter_model.safetensors" in hub.fetched
    assert "checkpoint-5/optimizer.safetensors" not in hub.fetched
    info = pleexport.inspect("org/gemma", adapters=["org/lora:0.5"], offline=True)
    assert [(adapter.name, adapter.weight) for adapter in info.adapters] == [("lora", 0.5)]


def test_inspect_fetches_no_weights(hub: Hub, tmp_path: Path) -> None:
    hub.models["org/gemma"] = gemma4(tmp_path / "gemma")
    info = pleexport.inspect("org/gemma")
    assert info.weights == "none"
    assert info.family == "gemma4"
    assert "model.safetensors" not in hub.fetched


# What fsspec opens.


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A folder in fsspec's own memory."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    files = fsspec.filesystem("memory")
    for name in NEEDED | OTHERS:
        files.pipe(f"/bucket/model/{name}", b"{}" if name.endswith("json") else name.encode())
    yield files
    files.rm("/bucket", recursive=True)


def test_an_object_store_is_read_like_the_hub(stored: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = find_remote("memory://bucket/model")
    assert found is not None
    assert found.name == "model"
    folder = found.fetch(QUIET)
    assert {p.name for p in folder.iterdir()} == NEEDED
    calls = []
    monkeypatch.setattr(type(stored), "get_file", lambda *a, **_: calls.append(a))
    assert fetched("memory://bucket/model") == folder
    assert not calls
    monkeypatch.undo()


def test_a_file_that_changed_in_the_store_is_fetched_again(stored: Any) -> None:
    folder = fetched("memory://bucket/model")
    stored.pipe("/bucket/model/config.json", b'{"changed": 1}')
    assert (fetched("memory://bucket/model") / "config.json").read_bytes() == b'{"changed": 1}'
    assert fetched("memory://bucket/model", offline=True) == folder


def test_a_store_that_cannot_be_opened_is_said_so() -> None:
    with pytest.raises(CheckpointError, match="`nonsense://x` cannot be fetched"):
        find_remote("nonsense://x")
    with pytest.raises(MissingDependencyError, match="needs a package that is not"):
        find_remote("adl://x/y")
    with pytest.raises(CheckpointError, match="`file:///x` is a URL"):
        find_remote("file:///x")
    with pytest.raises(CheckpointError, match="holds no"):
        fetched("memory://nothing/here")
