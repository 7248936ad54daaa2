"""Convert a Gemma 4 text checkpoint to a `.litertlm` file with LiteRT's own converter.

    python benchmarks/write_litertlm.py build/checkpoints/gemma4-small build/small-int4.litertlm

Needs an environment of its own: `pip install -r benchmarks/requirements-litertlm.txt`. It takes two
minutes and 6 GB of disk for a model of 0.6 billion parameters, which `export_hf` writes in float32
before it is quantized, so E2B's true size is out of reach here.

Recipes are those of the package `ai-edge-quantizer`. `gemma4_mixed48` is its own for Gemma 4:
4 bits a weight with one scale a channel, in the head and both tables too, and 8 bits in the
per-layer projections; `gemma4_mixed48_b32` has one scale a block of 32, as Q4_0 does.
`dynamic_wi8_afp32`, what `export_hf` takes when it is not asked, has 8 bits throughout.

Embeddings are external, as `export_hf` demands for this family. Every prompt length that is to be
measured gets a prefill of that length, lest shorter ones be padded, and the cache has the context
of our bundles: LiteRT attends to all of it, however little is filled. The vocabulary is made up
("t0", "t1", ...), which `peer_litertlm.py` relies on.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import types
from pathlib import Path

import litert_torch  # noqa: F401  before the stand-in, which PyTorch's compiler would look into
from ai_edge_litert import schema_py_generated
from ai_edge_quantizer import aeq
from tokenizers import Tokenizer, models, pre_tokenizers

# litert-torch 0.10 imports TensorFlow's copy of this schema, for image models alone, and does not
# require TensorFlow.
STAND_IN = types.ModuleType("tensorflow.lite.python")
STAND_IN.schema_py_generated = schema_py_generated  # type: ignore[attr-defined]
sys.modules[STAND_IN.__name__] = STAND_IN

from litert_torch.generative.export_hf import export  # noqa: E402

RECIPES = ("gemma4_mixed48", "gemma4_mixed48_b32", "dynamic_wi8_afp32")


def link_with_tokenizer(checkpoint: Path, folder: Path) -> None:
    """Link the checkpoint's files into `folder`, beside a tokenizer of one word a token id."""
    for path in checkpoint.iterdir():
        (folder / path.name).symlink_to(path.resolve())
    config = json.loads((checkpoint / "config.json").read_text())
    words = {f"t{i}": i for i in range(config["text_config"]["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"})
    )


def write_litertlm(
    checkpoint: Path, out: Path, *, recipe: str, prefill_lengths: list[int], context: int
) -> None:
    """Export in float32, then quantize."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as name:
        source, exported = Path(name, "source"), Path(name, "exported")
        source.mkdir()
        link_with_tokenizer(checkpoint, source)
        export.export(
            str(source),
            str(exported),
            externalize_embedder=True,
            prefill_lengths=prefill_lengths,
            cache_length=context,
            quantization_recipe="none",
        )
        failed = aeq.quantize_litertlm(str(exported / "model.litertlm"), recipe, name)
        if failed:
            raise SystemExit(f"error: recipe `{recipe}` quantized nothing")
        Path(name, f"model_{recipe}.litertlm").replace(out)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--recipe", choices=RECIPES, default=RECIPES[0])
    parser.add_argument(
        "--prefill-lengths",
        type=lambda text: [int(n) for n in text.split(",")],
        default=[128, 512],
    )
    parser.add_argument("--context", type=int, default=1024)
    arguments = parser.parse_args()
    write_litertlm(
        arguments.checkpoint,
        arguments.out,
        recipe=arguments.recipe,
        prefill_lengths=arguments.prefill_lengths,
        context=arguments.context,
    )


if __name__ == "__main__":
    main()
