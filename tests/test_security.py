"""What docs/security.md says of files from anywhere, where no other test shows it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import pleexport
from pleexport.checkpoint.text_files import refuse_links_out
from pleexport.errors import CheckpointError

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
