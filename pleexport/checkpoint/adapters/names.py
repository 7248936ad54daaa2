"""What the name of an adapter's tensor says: which module it belongs to, and what it is to it.

Trainers write the same module in many ways: with PEFT's prefix or without, below a multimodal
wrapper, below what torch.compile, FSDP or a value head puts around a model, and with the adapter's
name or without.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

# A: into the rank, B: out of it; "tokens": rows by token id; "base": what stands in place of the
# base's own tensor; "saved": what a module that is saved whole computes with.
Role = Literal["A", "B", "A of lookup", "B of lookup", "magnitude", "tokens", "base", "saved"]

_WRAPPED = re.compile(
    r"(^|\.)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|module)(?=\.)"
)
_PEFT = re.compile(r"^base_model\.(?:model\.)?")
_OUTER = re.compile(r"^(?:(?:base_model|pretrained_model|model|language_model|text_model)\.)+")
_ADAPTER = r"(?:\.[^.]+)?"
_PARTS: tuple[tuple[Role, re.Pattern[str]], ...] = (
    ("A", re.compile(rf"^(.+)\.lora_A{_ADAPTER}\.(weight)$")),
    ("B", re.compile(rf"^(.+)\.lora_B{_ADAPTER}\.(weight|bias)$")),
    ("A of lookup", re.compile(rf"^(.+)\.lora_embedding_A{_ADAPTER}()$")),
    ("B of lookup", re.compile(rf"^(.+)\.lora_embedding_B{_ADAPTER}()$")),
    ("magnitude", re.compile(rf"^(.+)\.lora_magnitude_vector{_ADAPTER}?(?:\.weight)?()$")),
    ("tokens", re.compile(rf"^(.+?)(?:\.token_adapter)?\.trainable_tokens_delta{_ADAPTER}()$")),
    ("saved", re.compile(rf"^(.+)\.modules_to_save{_ADAPTER}\.([^.]+)$")),
    ("base", re.compile(r"^(.+)\.original_module\.([^.]+)$")),
    ("base", re.compile(r"^(.+?)(?:\.token_adapter)?\.base_layer\.([^.]+)$")),
    ("base", re.compile(r"^(.+)\.([^.]+)$")),
)


@dataclass(frozen=True)
class TensorName:
    """One tensor of an adapter.

    Attributes:
        full: its name in the file.
        module: the name of its module in the model that was trained.
        leaf: "weight", "bias" or another tensor of the module.
    """

    full: str
    module: str
    role: Role
    leaf: str

    @property
    def is_plain(self) -> bool:
        """Whether it is called what the tensor of a model is, without a part of PEFT's."""
        return self.full.endswith(f"{self.module.rpartition('.')[2]}.{self.leaf}")


def read_name(name: str) -> TensorName | None:
    """What a name says; None where it is no name of a module's tensor."""
    plain = _PEFT.sub("", _WRAPPED.sub("", name).lstrip("."))
    for role, pattern in _PARTS:
        if match := pattern.match(plain):
            return TensorName(name, match[1], role, match[2] or "weight")
    return None


def key_of(name: str) -> str:
    """A name below the text model and everything that stands around it."""
    return _OUTER.sub("", name)
