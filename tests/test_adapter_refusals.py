"""What cannot be merged is refused in one sentence that names it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_folders import WEIGHTS, rewrite_config, rewrite_tensors, save_adapter
from checkpoints import gemma4
from family_checkpoints import embformer
from quantized_checkpoints import mobile_gemma4
from safetensors.torch import load_file

from pleexport.checkpoint.adapters.config import ADAPTER_CONFIG
from pleexport.errors import PleexportError
from pleexport.families.opening import open_model

Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"
A, B = f"{Q_PROJ}.lora_A.weight", f"{Q_PROJ}.lora_B.weight"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gemma4(tmp_path_factory.mktemp("base") / "base", torch.float32)


@pytest.fixture(scope="module")
def plain(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "plain"
    return save_adapter(base, folder, target_modules=["q_proj"], r=4)


@pytest.fixture
def adapter(plain: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return shutil.copytree(plain, tmp_path / "adapter")


def refusal(*args: Any, **options: Any) -> PleexportError:
    with pytest.raises(PleexportError) as err:
        open_model(*args, **options)
    assert err.value.hint
    assert "\n" not in err.value.message
    return err.value


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"peft_type": "IA3"}, "an adapter of type IA3; only LORA and TRAINABLE_TOKENS are merged"),
        ({"peft_type": None}, "has `peft_type` None; expected a name such as LORA"),
        ({"alora_invocation_tokens": [1]}, "asks for aLoRA, which acts on some tokens"),
        ({"target_parameters": ["x"]}, "(`target_parameters`); that cannot be merged here"),
        ({"init_lora_weights": "pissa_niter_4"}, "`init_lora_weights` pissa_niter_4, which"),
        ({"use_something_new": True}, "unknown fields `use_something_new`, which might change"),
        ({"r": 0}, "has `r` 0; expected a whole number above 0"),
        ({"lora_alpha": "x"}, "has `lora_alpha` 'x'; expected a number"),
        ({"lora_alpha": 1e39}, "has `lora_alpha` 1e+39; expected a number that float32 holds"),
        ({"lora_alpha": 10**400}, "0; expected a number that float32 holds"),
        ({"alpha_pattern": {"q": 1e39}}, "from names of modules to numbers that float32 holds"),
        ({"r": 10**400}, "and adapter_config.json gives it rank 1"),
        ({"modules_to_save": "x"}, "has `modules_to_save` 'x'; expected a list of names"),
        (
            {"rank_pattern": {"q": 0.5}},
            "expected a map from names of modules to whole numbers above 0",
        ),
        ({"rank_pattern": {"(": 3}}, "`rank_pattern`: `(` is no regular expression"),
        ({"trainable_token_indices": ["x"]}, "trained token indices ['x']; expected a list of ids"),
        ({"base_model_name_or_path": 3}, "has `base_model_name_or_path` 3; expected a name"),
        ({"r": 8}, f"`{A}` has shape [4, 32], and adapter_config.json gives it rank 8"),
        ({"use_dora": True}, "`use_dora` is true, and `model.layers.0.self_attn.q_proj` has no"),
    ],
)
def test_a_config_that_asks_for_what_is_not_merged_is_refused(
    base: Path, adapter: Path, fields: dict[str, Any], said: str
) -> None:
    rewrite_config(adapter, **fields)
    assert said in refusal(base, adapters=[adapter]).message


def with_rows(name: str, count: int) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name: torch.zeros(count, 32)}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda t: t | {A: torch.zeros(4, 33)},
            f"`{A}` and `{B}` make [32, 33], which does not fit [32, 32] of the base",
        ),
        (lambda t: t | {A: torch.zeros(0)}, f"`{A}` has shape [0], and adapter_config.json gives"),
        (lambda t: {n: v for n, v in t.items() if n != A}, f"has `{B}` and not both matrices"),
        (lambda t: t | {A: t[A].to(torch.int8)}, f"`{A}` has dtype int8; expected one of fp32"),
        (lambda t: t | {"unnamed": torch.zeros(4)}, "`unnamed` has no name that PEFT gives"),
        (
            lambda t: t | {f"{Q_PROJ}.lora_E": torch.zeros(4)},
            f"`{Q_PROJ}.lora_E` belongs to nothing in the base model",
        ),
        (
            lambda t: t | {"base_model.model.score.weight": torch.zeros(2, 32)},
            "`base_model.model.score.weight` belongs to nothing in the base model",
        ),
        (
            lambda t: t | {f"{Q_PROJ}.lora_B.bias": torch.zeros(32)},
            "changes `layers.0.self_attn.q_proj.bias`, and the base has no such bias",
        ),
        (
            lambda t: t | {f"{Q_PROJ}.lora_A.other.weight": torch.zeros(4, 32)},
            "and they differ",
        ),
        (
            with_rows("base_model.model.model.layers.0.mlp.up_proj.base_layer.weight", 7),
            "has shape [7, 32], which does not fit [48, 32] of the base",
        ),
        (
            with_rows(
                "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta", 2
            ),
            "has shape [2, 32], and adapter_config.json names 0 tokens for it",
        ),
        (lambda _: {}, "holds no tensors"),
    ],
)
def test_a_tensor_that_does_not_fit_is_refused(
    base: Path, adapter: Path, change: Callable[[Tensors], Tensors], said: str
) -> None:
    rewrite_tensors(adapter, change)
    assert said in refusal(base, adapters=[adapter]).message


def test_a_whole_tensor_keeps_the_size_that_the_model_needs(base: Path, adapter: Path) -> None:
    """Only what has a row for each token may have other rows."""
    rewrite_tensors(adapter, with_rows("base_model.model.model.layers.0.mlp.up_proj.weight", 48))
    open_model(base, adapters=[adapter])


def test_folders_that_are_no_adapter_are_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    assert "is no folder, so it is no adapter" in refusal(base, adapters=[tmp_path / "x"]).message
    assert "does not exist, so `" in refusal(base, adapters=[base]).message
    (adapter / ADAPTER_CONFIG).write_text("[]")
    assert "does not hold a JSON object" in refusal(base, adapters=[adapter]).message
    (adapter / ADAPTER_CONFIG).write_text("[")
    assert "is not valid JSON" in refusal(base, adapters=[adapter]).message
    (adapter / ADAPTER_CONFIG).unlink()
    (adapter / ADAPTER_CONFIG).mkdir()
    assert "cannot be read" in refusal(base, adapters=[adapter]).message


def test_an_adapter_without_weights_is_refused(base: Path, adapter: Path) -> None:
    (adapter / WEIGHTS).unlink()
    said = refusal(base, adapters=[adapter])
    assert "holds adapter_config.json and no adapter_model.safetensors" in said.message


def test_a_pickled_adapter_is_read_and_not_run(base: Path, adapter: Path) -> None:
    torch.save(load_file(adapter / WEIGHTS), adapter / "adapter_model.bin")
    name = "model.layers.0.self_attn.q_proj.weight"
    safe, _ = open_model(base, adapters=[adapter])
    (adapter / WEIGHTS).unlink()
    pickled, _ = open_model(base, adapters=[adapter])
    assert (pickled.array(name) == safe.array(name)).all()
    torch.save({"x": print}, adapter / "adapter_model.bin")
    assert "holds more than tensors" in refusal(base, adapters=[adapter]).message


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ("/nowhere/gemma", "names the base `/nowhere/gemma`, which is not here"),
        (None, "adapter_config.json names no base"),
    ],
)
def test_an_adapter_whose_base_is_not_here_is_refused(
    base: Path, adapter: Path, named: str | None, said: str
) -> None:
    rewrite_config(adapter, base_model_name_or_path=named)
    refused = refusal(adapter)
    assert said in refused.message
    assert "--base DIR" in str(refused.hint)
    checkpoint, _ = open_model(adapter, base=base)
    assert checkpoint.name == "adapter"


def test_the_base_of_an_adapter_is_taken_from_elsewhere(adapter: Path) -> None:
    rewrite_config(adapter, base_model_name_or_path="nobody/no-such-model")
    assert "nobody/no-such-model" in refusal(adapter, offline=True).message


def test_bases_that_are_none_are_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    assert "is an adapter itself" in refusal(adapter, base=adapter).message
    assert "is no adapter, so it has no base" in refusal(base, base=base).message
    other = embformer(tmp_path / "embformer")
    said = refusal(other, adapters=[adapter]).message
    assert "is of the family `embformer`, which transformers does not load" in said


def test_a_base_of_codes_is_refused(adapter: Path, tmp_path: Path) -> None:
    mobile = mobile_gemma4(tmp_path / "mobile")
    assert "holds codes, and an adapter cannot" in refusal(mobile, adapters=[adapter]).message


def test_weights_that_have_no_meaning_are_refused(base: Path, plain: Path, tmp_path: Path) -> None:
    assert (
        "has weight `nan`; expected a finite number"
        in refusal(base, adapters=[f"{plain}:nan"]).message
    )
    for name, fields, said in (
        ("dora", {"use_dora": True}, "a weight of 0.5 has no meaning for the norms"),
        ("saved", {"modules_to_save": ["norm"]}, "whole, which a weight of 0.5 has no meaning for"),
        ("tokens", {"trainable_token_indices": [1]}, "saves rows of tokens"),
    ):
        folder = save_adapter(base, tmp_path / name, target_modules=["q_proj"], **fields)
        assert said in refusal(base, adapters=[(folder, 0.5)]).message
        open_model(base, adapters=[folder])


def test_adapters_that_save_the_same_module_are_refused(base: Path, tmp_path: Path) -> None:
    folders = [
        save_adapter(
            base,
            tmp_path / name,
            seed=i,
            target_modules=["q_proj"],
            modules_to_save=["embed_tokens"],
        )
        for i, name in enumerate(("one", "two"))
    ]
    said = refusal(base, adapters=folders).message
    assert "saves `base_model.model.model.embed_tokens.weight` whole, but that tensor has" in said


def test_a_head_of_another_size_than_the_embedding_is_refused(base: Path, tmp_path: Path) -> None:
    folder = save_adapter(
        base, tmp_path / "a", target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]
    )
    rewrite_tensors(folder, lambda t: t | {"base_model.model.lm_head.weight": torch.zeros(125, 32)})
    said = refusal(base, adapters=[folder]).message
    assert "leave the head with 125 rows and the input embedding with 120" in said


def test_what_peft_itself_loses_is_refused(base: Path, tmp_path: Path) -> None:
    fields = {"target_modules": ["lm_head"], "trainable_token_indices": [3, 4]}
    folder = save_adapter(base, tmp_path / "adapter", **fields)
    said = refusal(base, adapters=[folder]).message
    assert "has both LoRA and trained tokens for a head that is tied" in said


def test_a_pattern_that_would_never_end_is_refused(base: Path, tmp_path: Path) -> None:
    folder = save_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    never = "(?:(?P<a>.)|(?P<b>.)|(?P<c>..))*(?P=a)(?P=b)(?P=c)[A-Z]"
    rewrite_config(folder, rank_pattern={never: 3})
    said = refusal(base, adapters=[folder]).message
    assert "of the config takes more than 0.25 s on `model.layers.0.self_attn.q_proj`" in said
    rewrite_config(folder, rank_pattern={r"(.)(.)\2": 3})
    said = refusal(base, adapters=[folder]).message
    assert r"the pattern `(.*\.)?((.)(.)\2)$` of the config is no regular expression: " in said
    # The control: what `re` takes seconds for on half of this name is nothing here.
    rewrite_config(folder, rank_pattern={r"(\w+\.?)+[A-Z]": 3})
    open_model(base, adapters=[folder])
