"""The World tokenizer of RWKV: the longest known piece of bytes at each place.

Its vocabulary is a text file with a line for each token: an id, a Python literal of a string or of
bytes, and the number of its bytes. Id 0, which has no line, ends a text.
"""

from __future__ import annotations

import ast
import codecs
import warnings
from collections.abc import Sequence
from pathlib import Path

from pleexport.errors import TokenizerError

VOCABULARY = "rwkv_vocab_v20230424.txt"


class WorldTokenizer:
    """Text to token ids and back.

    Raises:
        TokenizerError: the vocabulary is malformed.
    """

    def __init__(self, path: Path) -> None:
        self._pieces = _read_vocabulary(path)
        self._ids = {piece: i for i, piece in self._pieces.items()}
        # By first byte, the lengths of the pieces that begin with it, longest first.
        lengths: dict[int, set[int]] = {}
        for piece in self._ids:
            lengths.setdefault(piece[0], set()).add(len(piece))
        self._lengths = {byte: sorted(own, reverse=True) for byte, own in lengths.items()}

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text; there are no special tokens."""
        data, ids, position = text.encode(), [], 0
        while position < len(data):
            for length in self._lengths[data[position]]:
                token_id = self._ids.get(data[position : position + length])
                if token_id is not None:
                    ids.append(token_id)
                    position += length
                    break
        return ids

    def decode(self, ids: Sequence[int], *, with_specials: bool = False) -> str:
        """The text of ids; those without a piece stand for nothing."""
        return b"".join(self._pieces.get(i, b"") for i in ids).decode(errors="replace")

    def stream(self, prompt_ids: Sequence[int]) -> WorldStream:
        """A decoder of the ids that follow a prompt."""
        return WorldStream(self._pieces)

    @property
    def size(self) -> int:
        """Ids are below it."""
        return max(self._pieces) + 1

    def special_text(self, token_id: int) -> str:
        """The text of a special token; there are none."""
        return ""


class WorldStream:
    """Turns ids into text as they come: whole characters only, "" while one is incomplete."""

    def __init__(self, pieces: dict[int, bytes]) -> None:
        self._pieces = pieces
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The text that this id completes."""
        return self._decoder.decode(self._pieces.get(token_id, b""))

    def flush(self) -> str:
        """What is still held back when the text ends."""
        return self._decoder.decode(b"", final=True)


def _read_vocabulary(path: Path) -> dict[int, bytes]:
    pieces: dict[int, bytes] = {}
    try:
        lines = [line.partition(" ") for line in path.read_text(encoding="utf-8").split("\n")]
        literals = [rest.rpartition(" ")[::2] for _, _, rest in lines if rest]
        with warnings.catch_warnings():
            warnings.simplefilter("error", SyntaxWarning)  # of an escape that there is not
            # One parse of all literals takes a fifth of the time of one for each.
            values = ast.literal_eval("[" + ",\n".join(literal for literal, _ in literals) + "]")
        numbers = [int(number) for number, _, rest in lines if rest]
        for number, value, (_, size) in zip(numbers, values, literals, strict=True):
            piece = value.encode() if isinstance(value, str) else value
            if not isinstance(piece, bytes) or len(piece) != int(size) or not piece or number < 0:
                raise ValueError(f"token {number} is not {size} bytes")
            pieces[number] = piece
    except (OSError, ValueError, SyntaxError, MemoryError, RecursionError) as err:
        raise TokenizerError(
            f"`{path}` is not a vocabulary of RWKV's World tokenizer: {err}",
            hint="fetch the file again; it is published with the model",
        ) from err
    known = set(pieces.values())
    missing = next((byte for byte in range(256) if bytes([byte]) not in known), None)
    if missing is not None:
        raise TokenizerError(
            f"`{path}` has no token for byte {missing}, so some text has no ids",
            hint="fetch the file again; it is published with the model",
        )
    return pieces
