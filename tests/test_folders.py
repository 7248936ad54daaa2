"""What stands in a folder: what is read, as transformers does, and what is said of the rest."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from checkpoints import gemma4
from peft import LoraConfig, get_peft_model
from quantized_checkpoints import mobile_gemma4
from rwkv_checkpoints import rwkv
from safetensors.torch import load_file, save_file, save_model
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM

import pleexport
from pleexport import families
from pleexport.checkpoint.checkpoint import Checkpoint
from pleexport.checkpoint.finite import check_finite
from pleexport.checkpoint.matching import MatchedModel
from pleexport.errors import CheckpointError, PleexportError
from pleexport.parity.oracle import open_oracle
from pleexport.progress import Progress
from pleexport.show.inspection import describe_model

INDEX = "model.safetensors.index.json"
GATE = "model.layers.0.mlp.gate_proj.weight"
IDS = [3, 1, 4, 1, 5, 9]
EXACT: dict[str, Any] = {"table_dtype": "source", "weight_dtype": "fp32", "context": 64}
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 10\n"
HTML = "<!DOCTYPE html>\n<html><body>Log in</body></html>"


@pytest.fixture
def folder(gemma4_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint, to be changed."""
    return Path(shutil.copytree(gemma4_checkpoint, tmp_path / "checkpoint"))


@pytest.fixture
def config_only(folder: Path) -> Path:
    (folder / "model.safetensors").unlink()
    return folder


def touch(folder: Path, *names: str, content: bytes = b"\0" * 64) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def shard(folder: Path, tensors: dict[str, torch.Tensor], **index: Any) -> None:
    """Write tensors in two shards with their index."""
    names = sorted(tensors)
    parts = {
        "model-00001-of-00002.safetensors": names[::2],
        "model-00002-of-00002.safetensors": names[1::2],
    }
    for file, own in parts.items():
        save_file({name: tensors[name].clone() for name in own}, folder / file)
    weight_map = {name: file for file, own in parts.items() for name in own}
    values = {"metadata": {"total_size": 1}, "weight_map": weight_map} | index
    (folder / INDEX).write_text(json.dumps(values))


def changed(folder: Path, by: float = 1.0) -> dict[str, torch.Tensor]:
    tensors = load_file(folder / "model.safetensors")
    return tensors | {GATE: tensors[GATE] + by}


def matched(folder: Path) -> MatchedModel:
    checkpoint = Checkpoint(folder)
    return MatchedModel(families.resolve(checkpoint), checkpoint)


# The order of transformers.


def stale_index(folder: Path) -> None:
    shard(folder, changed(folder))
    for path in folder.glob("model-0*"):
        os.utime(path, (1, 1))


def stale_index_of_other_tensors(folder: Path) -> None:
    shard(folder, changed(folder) | {"model.extra": torch.ones(2)})


def newer_shards(folder: Path) -> None:
    shard(folder, changed(folder))
    os.utime(folder / "model.safetensors", (1, 1))


def index_without_shards(folder: Path) -> None:
    shard(folder, changed(folder))
    for path in folder.glob("model-0*"):
        path.unlink()


def index_of_the_whole_file(folder: Path) -> None:
    names = load_file(folder / "model.safetensors")
    weight_map = dict.fromkeys(names, "model.safetensors")
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def index_that_is_none(folder: Path) -> None:
    (folder / INDEX).write_text("[")


def shards(folder: Path) -> None:
    shard(folder, changed(folder))
    (folder / "model.safetensors").unlink()


def merged_index(folder: Path) -> None:
    """What a merge tool writes: metadata of its own, and a tied head that is in no file."""
    shards(folder)
    index = json.loads((folder / INDEX).read_text())
    index["metadata"] = {"mergekit_version": "0.1.4", "total_size": 1}
    index["weight_map"]["lm_head.weight"] = "model-00002-of-00002.safetensors"
    (folder / INDEX).write_text(json.dumps(index))


def shards_with_other_names(folder: Path) -> None:
    shards(folder)
    index = (folder / INDEX).read_text()
    for number in "12":
        new = f"merge/part {number}.safetensors"
        (folder / "merge").mkdir(exist_ok=True)
        (folder / f"model-0000{number}-of-00002.safetensors").rename(folder / new)
        index = index.replace(f"model-0000{number}-of-00002.safetensors", new)
    (folder / INDEX).write_text(index)


def a_tensor_in_two_shards(folder: Path) -> None:
    shards(folder)
    first, second = (folder / f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    for file, change in ((first, 5), (second, 7)):
        tensors = load_file(file)
        value = torch.full((48, 32), change / 100, dtype=torch.bfloat16)
        save_file(tensors | {GATE: value}, file)


def other_weights_beside(folder: Path) -> None:
    save_file(changed(folder), folder / "consolidated.safetensors")
    save_file(changed(folder), folder / "model.fp16.safetensors")
    torch.save(changed(folder), folder / "pytorch_model.bin")
    torch.save(changed(folder), folder / "consolidated.00.pth")
    touch(folder, "model.gguf", content=b"GGUF")


def newer_weights_beside(folder: Path) -> None:
    torch.save(changed(folder), folder / "pytorch_model.bin")
    os.utime(folder / "model.safetensors", (1, 1))


def a_training_beside(folder: Path) -> None:
    touch(folder, "optimizer.pt", "scheduler.pt", "training_args.bin", "rng_state.pth")
    touch(folder, "checkpoint-500/model.safetensors", "global_step500/mp_rank_00_model_states.pt")
    (folder / "trainer_state.json").write_text("{}")


def named_by_config(folder: Path) -> None:
    save_file(changed(folder), folder / "other.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["transformers_weights"] = "other.safetensors"
    (folder / "config.json").write_text(json.dumps(config))


ORDER: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "a whole file, nothing else": (lambda _: None, []),
    "a whole file beside shards": (
        stale_index,
        [
            f"`model.safetensors` is read, and the 2 shards of `{INDEX}` beside it are not, as in "
            "transformers; tensors have the same names: remove what is old"
        ],
    ),
    "a whole file beside shards of other tensors": (
        stale_index_of_other_tensors,
        ["they hold different tensors, `model.extra`"],
    ),
    "a whole file beside newer shards": (newer_shards, ["and the shards are newer: remove"]),
    "an index whose shards are gone": (
        index_without_shards,
        [
            f"`{INDEX}` is not read: its 2 shards are gone, and `model.safetensors` is there",
        ],
    ),
    "an index of the whole file": (index_of_the_whole_file, []),
    "an index that is none": (index_that_is_none, []),
    "shards": (shards, []),
    "the index of a merge": (
        merged_index,
        [f"`{INDEX}` lists tensor `lm_head.weight`, which is in no file; what the files have"],
    ),
    "shards with other names": (shards_with_other_names, []),
    "a tensor in two shards": (
        a_tensor_in_two_shards,
        [
            f"`{GATE}` is in both `model-00001-of-00002.safetensors` and "
            "`model-00002-of-00002.safetensors`; the latter is read, as in transformers"
        ],
    ),
    "other weights beside": (
        other_weights_beside,
        [
            "`consolidated.00.pth`, `consolidated.safetensors`, `model.fp16.safetensors`, "
            "`pytorch_model.bin` beside `model.safetensors` are not read, as in transformers"
        ],
    ),
    "newer weights beside": (
        newer_weights_beside,
        [
            "`pytorch_model.bin` beside `model.safetensors` is not read, as in transformers, "
            "although newer"
        ],
    ),
    "a training beside": (a_training_beside, []),
    "a file that the config names": (
        named_by_config,
        [
            "`config.json` names `other.safetensors` as the weights, which is read",
            "`model.safetensors` beside `other.safetensors` is not read, as in transformers",
        ],
    ),
}


@pytest.mark.parametrize("case", ORDER)
def test_the_files_are_read_that_transformers_reads(case: str, folder: Path) -> None:
    change, notes = ORDER[case]
    change(folder)
    model = matched(folder)
    assert len(model.checkpoint.notes) == len(notes)
    for note, expected in zip(model.checkpoint.notes, notes, strict=True):
        assert expected in note
    witness = AutoModelForCausalLM.from_pretrained(folder)
    own = witness.state_dict()
    for name in model.names():
        array = model.checkpoint.array(name).astype(np.float32)
        np.testing.assert_array_equal(array, own[name].float().numpy(), err_msg=name)
    # The oracle of parity, which may get its tensors from us; and the control.
    got = open_oracle(model).logits(IDS)
    with torch.no_grad():
        expected = witness.float()(torch.tensor([IDS])).logits[0].numpy()
        witness.model.layers[0].mlp.gate_proj.weight += 1
        other = witness(torch.tensor([IDS])).logits[0].numpy()
    np.testing.assert_allclose(got, expected, atol=1e-5)
    assert np.abs(other - expected).max() > 0.01


def adapter_of(folder: Path, out: Path) -> Path:
    """A trained adapter of a checkpoint, as PEFT saves it."""
    base = AutoModelForCausalLM.from_pretrained(folder)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "gate_proj"]))
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "lora_B" in name:
                tensor.add_(0.5)
    model.save_pretrained(out)
    return out


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_an_adapter_beside_a_model_is_told_and_not_merged(
    folder: Path, gemma4_checkpoint: Path, tmp_path: Path
) -> None:
    adapter = adapter_of(folder, tmp_path / "adapter")
    for path in adapter.glob("adapter_*"):
        shutil.copy(path, folder)
    (note,) = Checkpoint(folder).notes
    assert note == (
        "an adapter lies beside the model (`adapter_config.json`, `adapter_model.safetensors`), "
        f"and is not merged: the model is read as it is; `--adapter {folder}` merges it, if that "
        "has not been done"
    )
    got = open_oracle(matched(folder)).logits(IDS)
    np.testing.assert_array_equal(got, open_oracle(matched(gemma4_checkpoint)).logits(IDS))
    # The control: left alone, transformers loads the adapter.
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(folder).float()(torch.tensor([IDS])).logits
    assert np.abs(merged[0].numpy() - got).max() > 0.1


# Folders and files that are no checkpoint.


@dataclass(frozen=True)
class Refusal:
    """What is answered to a folder; `{}` is its path.

    Attributes:
        make: change a folder that has a config and nothing else.
        file: what is passed, inside the folder; the folder itself by default.
    """

    make: Callable[[Path], None]
    message: str
    hint: str
    file: str = ""


def only(*names: str, content: bytes = b"\0" * 64) -> Callable[[Path], None]:
    return lambda folder: touch(folder, *names, content=content)


def no_config(make: Callable[[Path], None]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for path in folder.iterdir():
            path.unlink()
        make(folder)

    return change


def in_place_of(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: touch(folder, name, content=text.encode())


def two_shards_without_index(folder: Path) -> None:
    for i in (1, 2):
        save_file({f"t{i}": torch.ones(1)}, folder / f"model-0000{i}-of-00002.safetensors")


def index_with(weight_map: dict[str, str], *files: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
        for file in files:
            save_file({"x": torch.ones(1)}, folder / file)

    return change


def config_with(**fields: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | fields))

    return change


def same_tensor_twice(folder: Path) -> None:
    save_file({"x.y": torch.ones(1), "module.x.y": torch.ones(1)}, folder / "model.safetensors")


def zipped(folder: Path) -> None:
    with zipfile.ZipFile(folder / "model.zip", "w") as file:
        file.writestr("config.json", "{}")


SOURCE = "use the safetensors checkpoint that it was made from"
SHARDS = {"x": "model-00001-of-00002.safetensors", "y": "model-00002-of-00002.safetensors"}
REFUSED: dict[str, Refusal] = {
    "DeepSpeed": Refusal(
        only("global_step500/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "zero_to_fp32.py"),
        "`{}` holds the parts that DeepSpeed saves on each device (`global_step500`), not a model",
        "join them: `python zero_to_fp32.py . joined --safe_serialization`",
    ),
    "a folder of DeepSpeed": Refusal(
        no_config(only("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt")),
        "parts that DeepSpeed saves on each device (`mp_rank_00_model_states.pt`), not a model",
        "zero_to_fp32.py",
    ),
    "FSDP": Refusal(
        only("pytorch_model_fsdp_0/__0_0.distcp", "pytorch_model_fsdp_0/.metadata", "optimizer.pt"),
        "`{}` holds the parts that FSDP saves on each device (`pytorch_model_fsdp_0`), not a model",
        "join them: `accelerate merge-weights pytorch_model_fsdp_0 joined`",
    ),
    "a folder of FSDP": Refusal(
        no_config(only("__0_0.distcp", "__1_0.distcp", ".metadata")),
        "the parts that FSDP saves on each device (`.metadata`), not a model",
        "accelerate merge-weights",
    ),
    "Megatron": Refusal(
        no_config(only("iter_0000500/mp_rank_00/x.pt", "latest_checkpointed_iteration.txt")),
        "the parts that Megatron saves on each device (`iter_0000500`), not a model",
        "convert it with the library that trained it",
    ),
    "a distributed model": Refusal(
        only("shard-00001-model-00001-of-00002.safetensors", "model.safetensors"),
        "`{}` holds the parts of a distributed model (`shard-*.safetensors`), not whole tensors",
        "save it again with `save_pretrained`",
    ),
    "an output folder of a training": Refusal(
        no_config(only("checkpoint-90/model.safetensors", "checkpoint-500/x", "training_args.bin")),
        "`{}` holds the checkpoints of a training, `checkpoint-500`, `checkpoint-90`, and no model",
        "pass one of them; the last is `{}/checkpoint-500`",
    ),
    "an adapter": Refusal(
        no_config(only("adapter_model.safetensors")),
        "`{}` holds an adapter (`adapter_model.safetensors`), not a whole model",
        "fetch adapter_config.json too; `pleexport build {}` then merges it into the base",
    ),
    "a bundle": Refusal(
        no_config(only("manifest.json", "embeddings.safetensors", "model.onnx")),
        "`{}` is a bundle that `pleexport build` wrote, not a checkpoint",
        "pass the checkpoint it was built from",
    ),
    "an empty folder": Refusal(
        no_config(lambda _: None), "`{}` is an empty folder", "holds config.json"
    ),
    "a folder around the folder": Refusal(
        no_config(only("snapshots/abc/config.json", "refs/main")),
        "`{}` holds no model itself: `{}/config.json` does not exist",
        "pass the folder in it: `{}/snapshots/abc`",
    ),
    "a folder of something else": Refusal(
        no_config(only("notes.md")),
        "`{}` holds no model: `{}/config.json` does not exist, and there are no weights",
        "pass a folder that holds config.json and the safetensors files",
    ),
    "several .pth files": Refusal(
        no_config(only("rwkv-1.pth", "rwkv-2.pth")),
        "`{}` holds 2 .pth files, `rwkv-1.pth`, `rwkv-2.pth`, and nothing says which one is the",
        "pass the path of one of them",
    ),
    "several .pth files of a model with a config": Refusal(
        only("consolidated.00.pth", "consolidated.01.pth"),
        "`{}` holds 2 .pth files, `consolidated.00.pth`, `consolidated.01.pth`, and nothing says",
        "save the model again as one file, with `model.save_pretrained(folder)`",
    ),
    "shards without an index": Refusal(
        two_shards_without_index,
        "`{}` holds 2 safetensors files, `model-00001-of-00002.safetensors`, "
        "`model-00002-of-00002.safetensors`, and no `model.safetensors.index.json`",
        "fetch the index, or leave one file and name it `model.safetensors`",
    ),
    "an index whose shards are gone": Refusal(
        index_with(SHARDS),
        "`{}/model-00001-of-00002.safetensors` does not exist, but `model.safetensors.index.json` "
        "lists it, and 1 more that are not there",
        "fetch the missing shards",
    ),
    "an index beside a whole file of another name": Refusal(
        index_with(SHARDS, "merged.safetensors"),
        "does not exist, but `model.safetensors.index.json` lists it, and 1 more that are not "
        "there; the folder has `merged.safetensors`, which it does not list",
        "if `merged.safetensors` is the whole model, name it `model.safetensors`",
    ),
    "an index with a shard missing": Refusal(
        index_with(SHARDS, "model-00001-of-00002.safetensors"),
        "`{}/model-00002-of-00002.safetensors` does not exist, but `model.safetensors.index.json` "
        "lists it",
        "fetch the missing shards",
    ),
    "an index that leads outside": Refusal(
        index_with({"x": "../a.safetensors"}), "points outside the folder", "do not use this"
    ),
    "an index of nothing": Refusal(index_with({}), "has no `weight_map`", "fetch the index again"),
    "a config that leads outside": Refusal(
        config_with(transformers_weights="/a.safetensors"),
        "`{}/config.json` has `transformers_weights` '/a.safetensors'; expected a safetensors file",
        "remove the field",
    ),
    "a config that names what is not there": Refusal(
        config_with(transformers_weights="a.safetensors"),
        "`{}/a.safetensors` does not exist, but `config.json` names it as the weights",
        "fetch the file, or remove `transformers_weights`",
    ),
    "a tensor with and without its wrapper": Refusal(
        same_tensor_twice,
        "`module.x.y` and `x.y` are the same tensor, saved from a wrapped module",
        "keep the files of one save only",
    ),
    "an empty config": Refusal(
        in_place_of("config.json", "{}"),
        "`{}/config.json` is an empty object: it says nothing of the model",
        "fetch the file again",
    ),
    "a config of nothing": Refusal(
        in_place_of("config.json", ""), "`{}/config.json` is empty: it has 0 bytes", "fetch"
    ),
    "a pointer as config": Refusal(
        in_place_of("config.json", LFS),
        "`{}/config.json` is a Git LFS pointer, not the file itself",
        "run `git lfs pull`",
    ),
    "a web page as config": Refusal(
        in_place_of("config.json", HTML),
        "`{}/config.json` is an HTML page, not the file itself",
        "fetch the file again, with a token where the model asks for one",
    ),
    "a pointer as weights": Refusal(
        in_place_of("model.safetensors", LFS),
        "`{}/model.safetensors` is a Git LFS pointer, not the file itself",
        "run `git lfs pull`",
    ),
    "a web page as weights": Refusal(
        in_place_of("model.safetensors", "\n " + HTML.lower()),
        "`{}/model.safetensors` is an HTML page, not the file itself",
        "a page of a login or an error was saved in its place",
    ),
    "a web page as index": Refusal(
        in_place_of(INDEX, HTML), "index.json` is an HTML page, not the file itself", "fetch"
    ),
    "a web page as .pth": Refusal(
        no_config(in_place_of("model.pth", HTML)), "`{}/model.pth` is an HTML page", "fetch"
    ),
    "a message as weights": Refusal(
        in_place_of("model.safetensors", "Access to model x is restricted."),
        "`{}/model.safetensors` is a text, not weights: it begins with `Access to model x is",
        "with a token where the model asks for one",
    ),
    "nothing as weights": Refusal(
        in_place_of("model.safetensors", ""),
        "`{}/model.safetensors` is empty: it has 0 bytes",
        "fetch the file again",
    ),
    "GGUF as weights": Refusal(
        in_place_of("model.safetensors", "GGUF\3"),
        "`{}/model.safetensors` holds GGUF, which is not read",
        "`q4_0-unquantized`",
    ),
    "a pickle as weights": Refusal(
        only("model.safetensors", content=b"\x80\x02}q\0."),
        "`{}/model.safetensors` holds pickled weights, which are not opened",
        "`model.save_pretrained(folder)`",
    ),
    "an archive as weights": Refusal(
        only("model.safetensors", content=b"PK\x03\x04" + b"\0" * 60),
        "`{}/model.safetensors` is an archive, not a checkpoint",
        "unpack it",
    ),
    "pickled weights": Refusal(
        only("pytorch_model.bin", "training_args.bin"),
        "`{}/pytorch_model.bin` holds pickled weights, which are not opened",
        "`model.save_pretrained(folder)`, which writes safetensors",
    ),
    "pickled shards": Refusal(
        only("pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"),
        "`{}/pytorch_model-00001-of-00002.bin` holds pickled weights",
        "`model.save_pretrained(folder)`",
    ),
    "pickled weights beside others of any name": Refusal(
        only("pytorch_model.bin", "new.safetensors"), "holds pickled weights", "save_pretrained"
    ),
    "an archive": Refusal(
        no_config(zipped), "`{}/model.zip` is an archive, not a checkpoint", "unpack it"
    ),
    "an archive itself": Refusal(
        zipped, "`{}/model.zip` is an archive, not a checkpoint", "unpack it", file="model.zip"
    ),
    "the config itself": Refusal(
        lambda _: None,
        "`{}/config.json` is a JSON file, not weights",
        "pass the folder that holds it",
        file="config.json",
    ),
    "a download": Refusal(
        only("model.safetensors.incomplete"),
        "`{}/model.safetensors.incomplete` is a download that is not complete",
        "let the download end",
    ),
}
FORMATS = {
    "model.gguf": ("GGUF", SOURCE),
    "model.ggml": ("GGML", SOURCE),
    "gemma-4.task": ("a MediaPipe task", SOURCE),
    "gemma-4.litertlm": ("a LiteRT-LM model", SOURCE),
    "model.tflite": ("a TensorFlow Lite graph", SOURCE),
    "model.onnx": ("an ONNX graph", SOURCE),
    "model.pte": ("an ExecuTorch program", SOURCE),
    "model.mlpackage": ("a Core ML model", SOURCE),
    "openvino_model.xml": ("an OpenVINO model", SOURCE),
    "tf_model.h5": ("Keras weights", SOURCE),
    "flax_model.msgpack": ("Flax weights", SOURCE),
    "model.ckpt.index": ("a TensorFlow checkpoint", SOURCE),
    "model.ckpt-500.data-00000-of-00001": ("a TensorFlow checkpoint", SOURCE),
    "_CHECKPOINT_METADATA": ("an Orbax checkpoint", SOURCE),
    "weights.npz": ("NumPy arrays", SOURCE),
    "weights.mlx": ("an MLX model", SOURCE),
    "model.nemo": ("a NeMo model", SOURCE),
}
for _name, (_what, _hint) in FORMATS.items():
    _message = f"`{{}}/{_name}` holds {_what}, which is not read"
    REFUSED[f"{_name} in a folder"] = Refusal(only(_name), _message, _hint)
    REFUSED[f"{_name} alone"] = Refusal(only(_name), _message, _hint, file=_name)


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_checkpoint_is_named_and_answered(case: str, config_only: Path) -> None:
    refusal = REFUSED[case]
    refusal.make(config_only)
    with pytest.raises(PleexportError) as caught:
        pleexport.inspect(config_only / refusal.file)
    message, hint = caught.value.message, str(caught.value.hint)
    assert refusal.message.replace("{}", str(config_only)) in message
    assert refusal.hint.replace("{}", str(config_only)) in hint
    assert "\n" not in message + hint


def test_a_config_alone_is_no_refusal(config_only: Path) -> None:
    a_training = ("optimizer.pt", "training_args.bin", "rng_state.pth", "README.md")
    touch(config_only, *a_training)
    assert pleexport.inspect(config_only).weights == "none"


@pytest.mark.parametrize("size", [0x280, 0x8B1F])
def test_a_header_whose_length_looks_like_a_mark_is_read(size: int, tmp_path: Path) -> None:
    header = b"{}".ljust(size)
    path = tmp_path / "b.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    assert Checkpoint(path).entries == {}


def test_a_pth_file_of_a_model_with_a_config_is_read(folder: Path, gemma4_checkpoint: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "model.pth")
    (folder / "model.safetensors").unlink()
    touch(folder, "rng_state.pth", "optimizer.pt")
    model = matched(folder)
    assert [file.path.name for file in model.checkpoint.files] == ["model.pth"]
    # transformers reads no such file, and gets the tensors from us.
    expected = open_oracle(matched(gemma4_checkpoint)).logits(IDS)
    np.testing.assert_array_equal(open_oracle(model).logits(IDS), expected)


def test_an_embedding_is_read_from_the_head_that_it_is_tied_to(
    folder: Path, gemma4_checkpoint: Path
) -> None:
    expected = matched(gemma4_checkpoint)
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    save_model(model, str(folder / "model.safetensors"))
    names = load_file(folder / "model.safetensors").keys()
    assert "lm_head.weight" in names
    assert "model.embed_tokens.weight" not in names
    got = matched(folder)
    assert got.checkpoint.notes == [
        "`model.embed_tokens.weight` is in no file, and is read from the head it is tied to, "
        "`lm_head.weight`"
    ]
    assert got.names() == expected.names()
    table = got.model.tables[0]
    np.testing.assert_array_equal(got.rows(table, slice(9)), expected.rows(table, slice(9)))
    # transformers reads the folder as it is.
    np.testing.assert_array_equal(open_oracle(got).logits(IDS), open_oracle(expected).logits(IDS))
    info = pleexport.inspect(folder)
    assert any("is read from the head it is tied to" in note for note in info.notes)
    assert info.counts == pleexport.inspect(gemma4_checkpoint).counts
    # The control: a head of its own is none.
    config_with(tie_word_embeddings=False)(folder)
    with pytest.raises(CheckpointError, match=r"has no tensor `embed_tokens.weight` under any"):
        matched(folder)


# Names of wrapped modules.

WRAPPED: dict[str, tuple[Callable[[str], str], str]] = {
    "torch.compile": ("_orig_mod.{}".format, "torch.compile (`_orig_mod.`)"),
    "DataParallel": ("module.{}".format, "DataParallel (`module.`)"),
    "both": (
        "module._orig_mod.{}".format,
        "torch.compile (`_orig_mod.`) and DataParallel (`module.`)",
    ),
    "compiled inside": (
        lambda name: name.replace("model.", "model._orig_mod."),
        "torch.compile (`_orig_mod.`)",
    ),
    "layers wrapped": (
        lambda name: name.replace("layers.0.", "layers.0._checkpoint_wrapped_module."),
        "activation checkpointing (`_checkpoint_wrapped_module.`)",
    ),
}


@pytest.mark.parametrize("make", [gemma4, mobile_gemma4])
@pytest.mark.parametrize("wrapper", WRAPPED)
def test_tensors_of_a_wrapped_model_are_read_without_the_prefix(
    wrapper: str, make: Callable[[Path], Path], tmp_path: Path
) -> None:
    folder = make(tmp_path / "checkpoint")
    plain = matched(folder)
    expected = open_oracle(plain).logits(IDS)
    wrap, who = WRAPPED[wrapper]
    tensors = load_file(folder / "model.safetensors")
    save_file({wrap(name): t for name, t in tensors.items()}, folder / "model.safetensors")
    model = matched(folder)
    (note,) = model.checkpoint.notes
    assert f" tensors were saved with the prefix of {who}, and are read without it: `" in note
    assert model.names() == plain.names()
    np.testing.assert_array_equal(open_oracle(model).logits(IDS), expected)


def test_a_wrapped_model_is_built_and_verified(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({f"_orig_mod.{n}": t for n, t in tensors.items()}, folder / "model.safetensors")
    told = Told()
    bundle = pleexport.build(folder, tmp_path / "bundle", progress=told, **EXACT)
    assert bundle.manifest.parity.passed
    assert told.lines[0].startswith(f"note: {len(tensors)} tensors were saved with the prefix of")


class Told(Progress):
    """Remembers what is said."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


@pytest.mark.parametrize(
    ("pattern", "there"),
    [
        ("policy.{}", "policy.model.embed_tokens.weight"),
        ("encoder.stuff.{}2", "encoder.stuff.model.embed_tokens.weight2"),
    ],
)
def test_an_unknown_prefix_names_a_tensor_that_is_there(
    pattern: str, there: str, folder: Path
) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({pattern.format(n): t for n, t in tensors.items()}, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        matched(folder)
    assert "under any of the known prefixes" in caught.value.message
    assert f"; `{there}` is there" in caught.value.message
    assert caught.value.hint == "rename the tensors as the model was published, or save it again"


def test_a_pth_file_of_a_wrapped_model_is_recognised(tmp_path: Path) -> None:
    path = rwkv(tmp_path / "model.pth", "7a")
    expected = open_oracle(matched(path)).logits(IDS)
    torch.save({f"module.{n}": t for n, t in torch.load(path, mmap=False).items()}, path)
    model = matched(path)
    assert "DataParallel (`module.`), and are read without it" in model.checkpoint.notes[0]
    np.testing.assert_array_equal(open_oracle(model).logits(IDS), expected)


def test_an_adapter_inside_a_model_is_explained(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    inside = {
        f"base_model.model.{n}".replace("q_proj", "q_proj.base_layer"): t
        for n, t in tensors.items()
    }
    save_file(inside, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"`base_model.model.model.embed_\w+.weight` is") as e:
        matched(folder)
    assert "save `model.merge_and_unload()`" in str(e.value.hint)


def test_what_deepspeed_leaves_ungathered_is_explained(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    empty = {name: torch.empty(0, dtype=tensor.dtype) for name, tensor in tensors.items()}
    save_file(empty, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"has shape \[0\]; the model has") as caught:
        matched(folder)
    assert "`zero_to_fp32.py`" in str(caught.value.hint)


# Numbers that are none.

PLE = "model.embed_tokens_per_layer.weight"
GATE_SCALE = "model.layers.0.mlp.gate_proj.weight_scale"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize(("value", "shown"), [(np.nan, "nan"), (np.inf, "inf"), (-np.inf, "-inf")])
@pytest.mark.parametrize(("name", "place"), [(GATE, (5, 7)), (PLE, (119, 47))])
def test_numbers_that_are_none_are_named_before_the_work(
    dtype: str, value: float, shown: str, name: str, place: tuple[int, int], folder: Path
) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors = {n: t.to(getattr(torch, dtype)) for n, t in tensors.items()}
    save_file(tensors, folder / "model.safetensors")
    check_finite(matched(folder))
    tensors[name][place] = value
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        check_finite(matched(folder))
    short = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64"}[dtype]
    assert caught.value.message == (
        f"`{folder}`: tensor `{name}` has {shown} at {list(place)} ({short})"
    )
    assert "take an earlier checkpoint" in str(caught.value.hint)


def test_a_signalling_number_is_named_without_a_warning(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors = {n: t.to(torch.bfloat16) for n, t in tensors.items()}
    tensors[GATE].view(torch.int16)[1, 2] = 0x7F81
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"has nan at \[1, 2\] \(bf16\)"):
        check_finite(matched(folder))


@pytest.mark.parametrize(
    ("stored", "computed", "largest"),
    [
        (torch.float32, "float16", 65519.996),
        (torch.bfloat16, "float16", 65280.0),
        (torch.float32, "bfloat16", 3.3961772292304457e38),
        (torch.float64, "float32", 3.4028235677973362e38),
    ],
)
def test_numbers_that_are_infinite_in_the_dtype_of_the_config_are_named(
    stored: torch.dtype, computed: str, largest: float, folder: Path
) -> None:
    config_with(dtype=computed)(folder)
    tensors = {n: t.to(stored) for n, t in load_file(folder / "model.safetensors").items()}
    limit = torch.tensor(largest, dtype=stored)
    assert torch.isfinite(limit.to(getattr(torch, computed)))  # the witness
    beyond = torch.nextafter(limit, torch.tensor(np.inf, dtype=stored))
    assert torch.isinf(beyond.to(getattr(torch, computed)))
    tensors[GATE][1, 2] = -limit
    save_file(tensors, folder / "model.safetensors")
    check_finite(matched(folder))
    tensors[GATE][1, 2] = -beyond
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"which is infinite in the (fp16|bf16|fp32)") as err:
        check_finite(matched(folder))
    assert f"`{GATE}` has " in err.value.message
    assert err.value.hint == "name a wider dtype in config.json, or save it again in one"


@pytest.mark.parametrize("name", [GATE_SCALE, "model.embed_tokens_per_layer.embedding_scale"])
def test_scales_that_are_no_numbers_are_named(name: str, tmp_path: Path) -> None:
    folder = mobile_gemma4(tmp_path / "checkpoint")
    check_finite(matched(folder))
    tensors = load_file(folder / "model.safetensors")
    tensors[name][3] = np.nan
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"tensor `{name}` has nan at \[3, 0\]"):
        check_finite(matched(folder))


def test_weights_of_a_pth_file_are_looked_at_too(tmp_path: Path) -> None:
    path = rwkv(tmp_path / "model.pth", "7a")
    check_finite(matched(path))
    tensors = torch.load(path, mmap=False)
    name = "blocks.0.ffn.key.weight"
    tensors[name] = tensors[name].T.contiguous().T  # as a file may have it
    tensors[name][2, 3] = np.inf
    torch.save(tensors, path)
    with pytest.raises(CheckpointError, match=rf"tensor `{name}` has inf at \[2, 3\]"):
        check_finite(matched(path))


def test_parts_that_are_left_out_may_hold_anything(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.vision_tower.0.weight"] = torch.full((2, 2), np.inf)
    save_file(tensors, folder / "model.safetensors")
    check_finite(matched(folder))


@pytest.mark.parametrize(
    "options",
    [
        {"verify": True},
        {"verify": False},
        {"max_bytes": 530_000},
        {"max_bytes": 530_000, "calibrate": True},
    ],
)
@pytest.mark.parametrize(("name", "value"), [(GATE, np.nan), (GATE, np.inf), (PLE, np.nan)])
def test_a_build_of_numbers_that_are_none_leaves_nothing(
    options: dict[str, Any], name: str, value: float, folder: Path, tmp_path: Path
) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name][5] = value
    save_file(tensors, folder / "model.safetensors")
    if options.get("calibrate"):
        text = tmp_path / "text.txt"
        text.write_text("a b c " * 50)
        words = {word: i for i, word in enumerate(["[UNK]", "a", "b", "c"])}
        tokenizer = tokenizers.Tokenizer(WordLevel(words, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = Whitespace()
        tokenizer.save(str(folder / "tokenizer.json"))
        options = options | {"calibrate": text}
    out = tmp_path / "out" / "bundle"
    with pytest.raises(CheckpointError, match=rf"`{name}` has (nan|inf) at \[5, 0\] \(bf16\)"):
        pleexport.build(folder, out, context=64, **options)
    assert [*out.parent.iterdir()] == []


# What transformers says, and what is shown.


def test_what_transformers_raises_is_one_sentence(folder: Path) -> None:
    config_with(initializer_range="wide")(folder)
    with pytest.raises(CheckpointError) as caught:
        open_oracle(matched(folder))
    assert caught.value.message.startswith("transformers 5.")
    assert f"cannot load the original in `{folder}`: " in caught.value.message
    assert "initializer_range" in caught.value.message
    assert "`--no-verify`" in str(caught.value.hint)


def test_inspect_shows_everything_that_is_not_read(folder: Path) -> None:
    other_weights_beside(folder)
    a_training_beside(folder)
    touch(folder, "adapter_model.safetensors", "adapter_config.json", "README.md")
    info = pleexport.inspect(folder)
    assert {kind.what: kind.names for kind in info.ignored} == {
        "an adapter, not merged": ["adapter_config.json", "adapter_model.safetensors"],
        "earlier checkpoints": ["checkpoint-500"],
        "other weights": [
            "consolidated.00.pth",
            "consolidated.safetensors",
            "model.fp16.safetensors",
        ],
        "state of a training": [
            "global_step500",
            "optimizer.pt",
            "rng_state.pth",
            "scheduler.pt",
            "trainer_state.json",
            "training_args.bin",
        ],
        "GGUF": ["model.gguf"],
        "pickled weights": ["pytorch_model.bin"],
        "other files": ["README.md"],
    }
    text = " ".join(describe_model(info).split())
    assert "Not read - an adapter, not merged: adapter_config.json, adapter_model.saf" in text
    assert "An adapter lies beside the model (`adapter_config.json`," in text


def test_a_file_of_the_bundle_that_is_something_else_is_refused(
    folder: Path, tmp_path: Path
) -> None:
    (folder / "tokenizer.json").write_text(LFS)
    assert any(
        "tokenizer.json` is a Git LFS pointer" in note for note in pleexport.inspect(folder).notes
    )
    with pytest.raises(CheckpointError, match=r"tokenizer.json` is a Git LFS pointer, not the"):
        pleexport.build(folder, tmp_path / "bundle", **EXACT)
    with pytest.raises(CheckpointError, match=r"there is no tokenizer.json"):  # the control
        pleexport.build(folder, tmp_path / "bundle", tokenizer=tmp_path, **EXACT)
