"""What docs/security.md says of files from anywhere, where no other test shows it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import onnx
import pytest
from resealed import fit_manifest

import pleexport
from pleexport.checkpoint.checkpoint import Checkpoint
from pleexport.checkpoint.text_files import refuse_links_out
from pleexport.errors import BundleError, CheckpointError
from pleexport.export.plan import copied_files

RUN = "from pathlib import Path\n\nPath({place!r}).touch()\n"


def test_code_that_a_config_points_to_is_not_run(gemma4_checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(gemma4_checkpoint, tmp_path / "checkpoint"))
    ran = tmp_path / "ran"
    code = RUN.format(place=str(ran))
    (folder / "evil.py").write_text(code, encoding="utf-8")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["auto_map"] = {
        "AutoConfig": "evil.EvilConfig",
        "AutoModelForCausalLM": "evil.EvilForCausalLM",
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    bundle = pleexport.build(
        folder, tmp_path / "bundle", weight_dtype="fp32", table_dtype="source", context=64
    )
    assert bundle.manifest.parity.passed
    assert not ran.exists()
    exec(code)  # the control: it would have been seen
    assert ran.exists()


@pytest.mark.parametrize("name", ["chat_template.jinja", "LICENSE", "tokenizer_config.json"])
def test_a_link_out_of_the_checkpoint_is_not_copied_into_a_bundle(
    name: str, gemma4_checkpoint: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(gemma4_checkpoint, tmp_path / "checkpoint"))
    secret = tmp_path / "secret.json"
    secret.write_text('{"token": "of mine"}', encoding="utf-8")
    (folder / name).symlink_to(secret)
    with pytest.raises(CheckpointError, match=rf"`.*/{name}` is a link out of its folder, to `"):
        pleexport.build(folder, tmp_path / "bundle", verify=False)
    assert not (tmp_path / "bundle").exists()


def test_a_link_to_itself_is_no_file(gemma4_checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(gemma4_checkpoint, tmp_path / "checkpoint"))
    (folder / "generation_config.json").unlink(missing_ok=True)
    (folder / "generation_config.json").symlink_to("generation_config.json")
    refuse_links_out(folder)
    assert "generation_config.json" not in copied_files(Checkpoint(folder))


def test_links_that_stay_inside_are_followed(tmp_path: Path) -> None:
    (tmp_path / "LICENSE.txt").write_text("Do good.", encoding="utf-8")
    (tmp_path / "LICENSE").symlink_to("LICENSE.txt")
    refuse_links_out(tmp_path)
    # Those of the hub's cache lead from a snapshot to the file of the same repository.
    snapshot = tmp_path / "models--org--name" / "snapshots" / "commit"
    blobs = tmp_path / "models--org--name" / "blobs"
    for cached in (snapshot, blobs):
        cached.mkdir(parents=True)
    (blobs / "digest").write_text("{}", encoding="utf-8")
    (snapshot / "config.json").symlink_to("../../blobs/digest")
    refuse_links_out(snapshot)
    # The control: another repository's file is none of it.
    (snapshot / "tokenizer.json").symlink_to(tmp_path / "LICENSE.txt")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json` is a link out of its folder"):
        refuse_links_out(snapshot)


@pytest.mark.parametrize("place", ["../outside.data", "{outside}", "link.data"])
def test_a_graph_takes_no_weights_from_outside_its_bundle(
    place: str, gemma4_bundle: Path, tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(gemma4_bundle, tmp_path / "bundle"))
    outside = tmp_path / "outside.data"
    shutil.copy(bundle / "model.onnx.data", outside)
    point_to(bundle, "model.onnx.data")  # the control
    pleexport.Runner(bundle).logits([1, 2])
    point_to(bundle, place.format(outside=outside))
    (bundle / "link.data").symlink_to(outside)
    with pytest.raises(BundleError, match=r"cannot be loaded: .*External data path"):
        pleexport.Runner(bundle)


def point_to(bundle: Path, place: str) -> None:
    """Let the graph of a bundle take its weights from a place, and make the bundle fit that."""
    path = bundle / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = place
    path.write_bytes(model.SerializeToString())
    fit_manifest(bundle)
