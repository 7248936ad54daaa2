"""A traced model, which backends lower."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pleexport.contract import GraphContract

if TYPE_CHECKING:
    from torch.export import ExportedProgram

# The argument of a traced program that says which positions want logits.
LOGIT_POSITIONS = "logit_positions"


@dataclass(frozen=True)
class Argument:
    """An argument of a traced program; dynamic dimensions by name."""

    name: str
    shape: list[int | str]
    dtype: str


@dataclass(frozen=True)
class Program:
    """A traced model, its weights by name and without values.

    Attributes:
        results: names of its results up to the hidden values.
        hidden: names of what the layers hand on, its last results.
    """

    exported: ExportedProgram
    contract: GraphContract
    arguments: list[Argument]
    results: list[str]
    hidden: list[str]
