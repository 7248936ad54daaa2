from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import SAMPLES
from family_checkpoints import EMBFORMER
from rwkv_checkpoints import rwkv_tensors

from pleexport import families
from pleexport.checkpoint.checkpoint import Checkpoint
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
    assert f"{families.resolve(Checkpoint(folder)).family}-kjv" == folder.name


def check(model: torch.nn.Module, reference: Reference, *, vocab: int) -> None:
    ids = torch.randint(vocab, (TOKENS,), generator=torch.Generator().manual_seed(0))
    state = reference.start()
    expected = [reference.step(reference.vectors(int(i)), state)[0] for i in ids]
    with torch.no_grad():
        logits = model(**model.look_up(ids[None]))[0]
    torch.testing.assert_close(logits, torch.stack(expected), atol=1e-4, rtol=1e-4)
