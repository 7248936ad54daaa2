"""An open ExecuTorch program with the caches of one text, written in place."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pleexport.backends.executorch import program
from pleexport.backends.executorch.bounds import LOGITS_PER_CALL, TOKENS_PER_CALL
from pleexport.backends.executorch.surroundings import unlogged_call
from pleexport.backends.slots import Slots
from pleexport.contract import GraphContract, pieces
from pleexport.errors import VERIFY_HINT, BundleError, InputError

# Source: executorch/exir/_serialize/scalar_type.fbs, FLOAT.
_FLOAT32 = 6


class ExecutorchSession:
    """An open program; see `backends.base.Session`.

    Args:
        context: largest number of positions.
        threads: 0 for one a core.
        outputs: how many values a call gives; logits alone by default.
    Raises:
        BundleError: the file cannot be loaded, or contradicts the contract.
        InputError: open sessions have another number of threads.
    """

    def __init__(
        self,
        path: Path,
        contract: GraphContract,
        *,
        context: int,
        threads: int = 0,
        outputs: int | None = None,
    ) -> None:
        _THREADS.use(threads, self)
        self._path, self._contract = path, contract
        # The program must live as long as its method.
        self._program, self._method = program.load(path)
        _check(self._method, contract, outputs=outputs, where=str(path))
        self.chunk = min(TOKENS_PER_CALL, contract.tokens_per_call or TOKENS_PER_CALL)
        self._caches = _Caches(contract, context=context, chunk=self.chunk)
        self._position = 0
        self._has_run = False

    def feed(
        self, vectors: Mapping[str, NDArray[np.float32]], count: int, *, keep: int
    ) -> NDArray[np.float32]:
        """Logits `[n, vocab]` after the next tokens; see `backends.base.Session.feed`."""
        wanted = keep or count
        parts = [part for (part,) in self._all_calls(vectors, count, wanted)]
        # The first call may have no logits that are wanted, but gives some.
        return np.concatenate(parts)[-wanted:]

    def hidden(
        self, vectors: Mapping[str, NDArray[np.float32]], count: int
    ) -> list[NDArray[np.float32]]:
        """All values `[T, ...]` of a program without logits, for the next tokens."""
        calls = self._all_calls(vectors, count, count)
        return [np.concatenate(parts) for parts in zip(*calls, strict=True)]

    def rewind(self, count: int) -> int:
        """Forget tokens of the last call; see `backends.base.Session.rewind`."""
        self._position -= count
        return count

    def reset(self) -> None:
        """Forget the text so far."""
        self._position = 0

    def _all_calls(
        self, vectors: Mapping[str, NDArray[np.float32]], count: int, wanted: int
    ) -> Iterator[list[NDArray[np.float32]]]:
        """What each call for `count` tokens gives; copies, since the next takes the memory."""
        for piece, kept in _calls(count, wanted):
            outputs = self._run(self._contract.cut(vectors, piece), piece.stop - piece.start, kept)
            yield [value.numpy()[0].copy() for value in outputs]

    def _run(
        self, vectors: Mapping[str, NDArray[np.float32]], count: int, kept: int
    ) -> list[torch.Tensor]:
        """What one call gives, in memory that the next call takes again."""
        begin = self._position
        inputs = [
            torch.from_numpy(np.ascontiguousarray(vectors[lookup.name], dtype=np.float32)[None])
            for lookup in self._contract.lookup_inputs
        ]
        inputs.append(torch.arange(begin, begin + count)[None])
        inputs += self._caches.tensors(begin + count)
        inputs.append(torch.arange(count - kept, count))
        # Inputs are taken by address, so they must live until the call is over.
        try:
            # A program that contradicts itself fails at its first call.
            with nullcontext() if self._has_run else unlogged_call():
                self._method.set_inputs(inputs)
                self._method.execute()
                outputs: list[torch.Tensor] = self._method.get_outputs(False)
        except RuntimeError as err:
            raise BundleError(f"`{self._path}` cannot be run: {err}", hint=VERIFY_HINT) from err
        self._has_run = True
        self._position += count
        return outputs


def _calls(count: int, wanted: int) -> Iterator[tuple[slice, int]]:
    """The calls for `count` tokens whose last `wanted` positions want logits.

    Yields:
        the tokens of a call, and how many of its last positions have logits: a program gives at
        least one, and at most `LOGITS_PER_CALL`.
    """
    if wanted <= LOGITS_PER_CALL:
        yield slice(0, count), wanted
        return
    first = count - wanted
    if first:
        yield slice(0, first), 1
    for piece in pieces(wanted, LOGITS_PER_CALL):
        yield slice(first + piece.start, first + piece.stop), piece.stop - piece.start


class _Caches:
    """The buffers that the program writes; slots come first, so nothing moves when they grow."""

    def __init__(self, contract: GraphContract, *, context: int, chunk: int) -> None:
        self._slots = Slots(contract, context=context, chunk=chunk)
        self._whole = self._slots.allocate()
        self._bound: list[torch.Tensor] = []

    def tensors(self, positions: int) -> list[torch.Tensor]:
        """The buffers, with room for `positions`."""
        slots = self._slots.grow(positions)
        if slots is not None:
            self._bound = [
                torch.from_numpy(whole[:, :held])
                for whole, held in zip(self._whole, slots, strict=True)
            ]
        return self._bound


class _Threads:
    """The one pool of threads that all programs of a process share.

    A program whose pool is exchanged under it fails at its next call, so that waits until none is
    open.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count: int | None = None
        self._sessions: weakref.WeakSet[ExecutorchSession] = weakref.WeakSet()

    def use(self, threads: int, session: ExecutorchSession) -> None:
        """Give a new session so many threads; 0 for those of open sessions, else one a core.

        Raises:
            InputError: other sessions are open with another number.
        """
        with self._lock:
            wanted = threads or (self._count if self._sessions else os.cpu_count()) or 1
            if wanted != self._count:
                if self._sessions:
                    raise InputError(
                        f"an open ExecuTorch bundle has {self._count} threads, and this one asks "
                        f"for {wanted}; all of a process share them",
                        hint="ask for the same number, or close the other bundle first",
                    )
                program.use_threads(wanted)
                self._count = wanted
            self._sessions.add(session)


_THREADS = _Threads()


def _check(method: Any, contract: GraphContract, *, outputs: int | None, where: str) -> None:
    """Refuse a program whose inputs and outputs are not those of the contract.

    Raises:
        BundleError: names what differs, or what the program contradicts itself in.
    """
    try:
        with unlogged_call():
            wrong = _differences(method.method_meta(), contract, outputs=outputs)
    except (RuntimeError, IndexError) as err:
        raise BundleError(f"`{where}` cannot be loaded: {err}", hint=VERIFY_HINT) from err
    if wrong:
        raise BundleError(
            f"`{where}` and the manifest disagree about {', '.join(wrong)}",
            hint="files of two bundles may be mixed; copy the bundle again, or rebuild it",
        )


def _differences(meta: Any, contract: GraphContract, *, outputs: int | None) -> list[str]:
    """What a program takes or gives otherwise than the contract says, as clauses."""
    expected = [(lookup.name, lookup.shape) for lookup in contract.lookup_inputs]
    expected.append(("position_ids", [1, "sequence_length"]))
    expected += [(cache.input, cache.shape) for cache in contract.caches]
    expected.append(("logit_positions", ["num_logits"]))
    wrong = []
    if meta.num_inputs() != len(expected):
        wrong.append(f"the number of inputs ({meta.num_inputs()}, not {len(expected)})")
    else:
        for i, (name, shape) in enumerate(expected):
            bounded = [contract.bounds.get(n, 0) if isinstance(n, str) else n for n in shape]
            if list(meta.input_tensor_meta(i).sizes()) != bounded:
                wrong.append(f"`{name}`")
    if meta.num_outputs() != (outputs or 1):
        wrong.append("the number of outputs")
    elif outputs is None and not _are_logits(meta.output_tensor_meta(0), contract.vocab_size):
        wrong.append("`logits`")
    return wrong


def _are_logits(meta: Any, vocab_size: int) -> bool:
    sizes = meta.sizes()
    shape_fits = len(sizes) == 3 and (sizes[0], sizes[2]) == (1, vocab_size)
    return shape_fits and meta.dtype() == _FLOAT32
