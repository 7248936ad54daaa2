"""What docs/security.md says of files from anywhere, where no other test shows it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pleexport

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
