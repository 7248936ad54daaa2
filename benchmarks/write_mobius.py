"""Convert a Gemma 4 text checkpoint to int4 ONNX with mobius and ONNX Runtime's quantizer.

    python benchmarks/write_mobius.py build/checkpoints/gemma4-small build/small-mobius

Needs an environment of its own: `pip install -r benchmarks/requirements-mobius.txt`. mobius builds
the text model in float32, for ONNX Runtime's CPU provider and with a config for onnxruntime-genai;
then ONNX Runtime's quantizer gives every matrix, the head and both tables 4 bits with one scale a
block of 32, as in Q4_0. (`mobius build-gguf --keep-quantized` would take llama.cpp's file, but
mobius 0.1 cannot read metadata that differ by layer.) While this runs, the float32 model takes
3 GB of disk for 0.6 billion parameters.

The config is adapted. mobius wants a vision tower of a `gemma4`, so the text model goes alone, in
one graph that looks its tables up by itself. And it stores rotary angles of every position, so the
context is that of our bundles.

mobius 0.1 computes logits of every token of a prompt. `--last-logits` keeps those of the last one,
as the other engines do and mobius after 0.1 offers.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import tempfile
from pathlib import Path

import numpy as np
import onnx
from mobius.__main__ import main as mobius
from onnxruntime.quantization.matmul_nbits_quantizer import (
    DefaultWeightOnlyQuantConfig,
    MatMulNBitsQuantizer,
)

BLOCK = 32


def link_with_text_config(checkpoint: Path, folder: Path, *, context: int) -> None:
    """Link the checkpoint's weights into `folder`, beside the text model's config."""
    for path in checkpoint.glob("model*.safetensors*"):
        (folder / path.name).symlink_to(path.resolve())
    config = json.loads((checkpoint / "config.json").read_text())
    text = config["text_config"] | {
        "architectures": ["Gemma4ForCausalLM"],
        "dtype": config["dtype"],
        "eos_token_id": config["eos_token_id"],
        "max_position_embeddings": context,
    }
    (folder / "config.json").write_text(json.dumps(text))


def keep_last_logits(model: onnx.ModelProto) -> None:
    """Let the output head see the last token of a prompt only."""
    nodes = model.graph.node
    (place,) = (i for i, node in enumerate(nodes) if node.name.startswith("lm_head/"))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([-1]), "last_token"))
    nodes.insert(
        place,
        onnx.helper.make_node(
            "Gather", [nodes[place].input[0], "last_token"], ["last_hidden"], axis=1
        ),
    )
    nodes[place + 1].input[0] = "last_hidden"


def quantized(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with 4 bits a value in matrices and tables."""
    logging.getLogger("onnxruntime.quantization").setLevel(logging.WARNING)
    quantizer = MatMulNBitsQuantizer(
        model,
        algo_config=DefaultWeightOnlyQuantConfig(
            block_size=BLOCK,
            is_symmetric=True,
            accuracy_level=4,  # int8 activations, as mobius asks of 4-bit weights on the CPU
            op_types_to_quantize=("MatMul", "Gather"),
        ),
    )
    quantizer.process()
    result: onnx.ModelProto = quantizer.model.model
    return result


def write_mobius(checkpoint: Path, out: Path, *, context: int, last_logits: bool) -> None:
    """Build in float32, then quantize."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as name:
        source, built = Path(name, "source"), Path(name, "built")
        source.mkdir()
        link_with_text_config(checkpoint, source, context=context)
        mobius(
            [
                "build", "--config", str(source), str(built),
                "--dtype", "f32", "--ep", "cpu", "--runtime", "ort-genai",
            ]
        )  # fmt: skip
        model = quantized(onnx.load(built / "model.onnx"))
        shutil.copy(built / "genai_config.json", out)
    if last_logits:
        keep_last_logits(model)
    (out / "model.onnx.data").unlink(missing_ok=True)  # onnx would append
    onnx.save(model, out / "model.onnx", save_as_external_data=True, location="model.onnx.data")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--last-logits", action="store_true", help="of a prompt's last token only")
    arguments = parser.parse_args()
    write_mobius(
        arguments.checkpoint,
        arguments.out,
        context=arguments.context,
        last_logits=arguments.last_logits,
    )


if __name__ == "__main__":
    main()
