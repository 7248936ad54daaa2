from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from conftest import SAMPLES
from family_checkpoints import EMBFORMER
from rwkv_checkpoints import rwkv_tensors
from safetensors.torch import load_file

from pleexport.codes import unpack_codes
from pleexport.model import Reference
from pleexport.references.embformer import EmbformerReference
from pleexport.references.rwkv import RwkvReference

TOKENS = 37  # neither a multiple of the training recurrence's chunks, nor less than one
RANKS = {"decay_rank": 32, "rate_rank": 32, "value_rank": 32, "gate_rank": 64}


@pytest.fixture(autouse=True)
def _import_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SAMPLES))


def test_rwkv_model_computes_what_the_reference_does() -> None:
    from rwkv_model import Rwkv7a

    tensors = rwkv_tensors("7a", vocab=50, width=64, layers=3, head_size=32, **RANKS)
    model = Rwkv7a(vocab=50, width=64, layers=3, head_size=32)
    model.load_state_dict(tensors)
    check(model, RwkvReference(tensors), vocab=50)


def test_embformer_model_computes_what_the_reference_does() -> None:
    from embformer_model import Embformer

    torch.manual_seed(0)
    config = EMBFORMER | {"initializer_range": 0.5}
    model = Embformer(config)
    tensors = {name: value.detach() for name, value in model.named_parameters()}
    check(model, EmbformerReference(tensors, config), vocab=config["vocab_size"])


@pytest.mark.parametrize("folder", sorted(SAMPLES.glob("*-kjv")), ids=lambda path: path.name)
def test_samples_are_named_after_their_family(folder: Path) -> None:
    from evaluate import family_name

    assert f"{family_name(folder)}-kjv" == folder.name


def test_rounding_passes_gradients_and_teaches_its_scale() -> None:
    from quantized_model import round_weights

    values = torch.tensor([[-0.9, -0.14, 0.06, 0.7]], requires_grad=True)
    scale = torch.tensor([[0.2]], requires_grad=True)
    rounded = round_weights(values, scale, bits=2)
    torch.testing.assert_close(rounded, torch.tensor([[-0.4, -0.2, 0.0, 0.2]]))
    rounded.sum().backward()
    assert values.grad is not None
    assert scale.grad is not None
    assert values.grad.tolist() == [[0, 1, 1, 0]]  # the outer two are clipped
    torch.testing.assert_close(scale.grad, torch.tensor([[-2 + (-1 + 0.7) + (0 - 0.3) + 1.0]]))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_searched_scale_has_the_least_error(bits: int) -> None:
    from quantized_model import round_weights, search_scales

    values = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))

    def error(scales: torch.Tensor) -> torch.Tensor:
        return (round_weights(values, scales, bits=bits) - values).square().sum(-1)

    best = search_scales(values, bits=bits)
    unclipped = values.abs().amax(-1, keepdim=True) / 2 ** (bits - 1)
    assert (error(best) <= error(unclipped)).all()
    assert (error(best) < error(2 * unclipped)).all()
    assert bits == 8 or (error(best) < error(unclipped)).any()


def test_a_quantized_model_is_saved_as_it_was_rounded(tmp_path: Path) -> None:
    from models import GemmaFamily, QuantizedGemmaFamily, create_gemma4, trained_state

    def create() -> torch.nn.Module:
        sizes = {"hidden_size": 36, "intermediate_size": 18, "hidden_size_per_layer_input": 6}
        return create_gemma4(**sizes, vocab_size=90, vocab_size_per_layer_input=90)

    torch.manual_seed(0)
    start = GemmaFamily(create)
    start.save(trained_state(start.build()), tmp_path / "start")
    family = QuantizedGemmaFamily(create, start=tmp_path / "start")
    model, ids = family.build(), torch.randint(90, (2, 30))

    def logits(model: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return family.compute_logits(model, family.look_up(model, ids))

    unrounded = logits(family.load_start())
    logits(model.train())  # where the scales of activations come from
    expected = logits(model.eval())
    family.save(trained_state(model), tmp_path / "saved")
    torch.testing.assert_close(logits(family.load(tmp_path / "saved")), expected)
    assert (unrounded - expected).abs().max() > 0.01 * (expected.max() - expected.min())


def test_the_quantized_sample_follows_the_published_recipe() -> None:
    folder = SAMPLES / "gemma4-qat-kjv"
    assert sum(file.stat().st_size for file in folder.iterdir()) < 6e6
    tensors = load_file(folder / "model.safetensors")
    widths = {name: 4 * tensor.shape[-1] for name, tensor in tensors.items() if tensor.ndim}
    embedding, head = "model.embed_tokens.embedding_quantized", "lm_head.weight"
    assert widths[embedding] == widths["model.layers.7.mlp.gate_proj.weight"] == 192  # 2 bits
    assert widths["model.layers.0.mlp.gate_proj.weight"] == 2 * 192
    assert widths["model.layers.0.per_layer_input_gate.weight"] == 4 * 192
    assert widths["model.embed_tokens_per_layer.embedding_quantized"] == 2 * 8 * 64
    assert tensors["model.embed_tokens_per_layer.embedding_scale"].shape == (4096, 8)
    assert torch.equal(tensors[head], tensors[embedding])
    assert set(unpack_codes(tensors[head].numpy(), bits=2, width=192).ravel().tolist()) == set(
        range(-2, 2)
    )
    for name, tensor in tensors.items():
        if re.search("_(activation|cache)_scale$", name):
            assert bool(tensor) != name.startswith("lm_head."), name


def test_training_with_rounding_beats_rounding_alone() -> None:
    from corpus import read_heldout
    from evaluate import make_scorer, measure_loss
    from models import FAMILIES
    from tokenizer import encode_documents
    from tokenizers import Tokenizer

    family, folder = FAMILIES["gemma4-qat"], SAMPLES / "gemma4-qat-kjv"
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    chapters = encode_documents(tokenizer, read_heldout()[:2], family.vocabulary)
    trained, rounded = family.load(folder), family.build().eval()
    losses = [measure_loss(make_scorer(family, model), chapters) for model in (trained, rounded)]
    assert losses[0] < losses[1] - 0.05


def check(model: torch.nn.Module, reference: Reference, *, vocab: int) -> None:
    ids = torch.randint(vocab, (TOKENS,), generator=torch.Generator().manual_seed(0))
    state = reference.start()
    expected = [reference.step(reference.vectors(int(i)), state)[0] for i in ids]
    with torch.no_grad():
        logits = model(**model.look_up(ids[None]))[0]
    torch.testing.assert_close(logits, torch.stack(expected), atol=1e-4, rtol=1e-4)
