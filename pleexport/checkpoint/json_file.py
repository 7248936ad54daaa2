"""Read the JSON files of a checkpoint's folder; what is none says what it is instead."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pleexport.checkpoint.foreign import refuse_foreign
from pleexport.errors import CheckpointError
from pleexport.whole_file import read_whole


def read_json(path: Path) -> dict[str, Any]:
    """The object that a file holds.

    Raises:
        CheckpointError: the file is missing, something else, or no JSON object.
    """
    try:
        raw = read_whole(path)
    except FileNotFoundError as err:
        raise CheckpointError(
            f"`{path}` does not exist",
            hint="a checkpoint folder holds config.json and the safetensors files",
        ) from err
    except OSError as err:
        raise CheckpointError(
            f"`{path}` cannot be read: {err.strerror}", hint="check the file and its permissions"
        ) from err
    refuse_foreign(path)
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as err:
        raise CheckpointError(
            f"`{path}` is not valid JSON ({err})", hint="fetch the file again"
        ) from err
    if not isinstance(value, dict):
        raise CheckpointError(f"`{path}` does not hold a JSON object", hint="fetch the file again")
    return value
