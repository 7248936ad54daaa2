"""An open ONNX graph with the caches and states of one text, bound in place."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from pleexport.backends.onnx.files import NUM_LOGITS_TO_KEEP, give_back_memory
from pleexport.backends.slots import Slots
from pleexport.contract import LOGITS_OUTPUT, POSITION_IDS, GraphContract
from pleexport.errors import VERIFY_HINT, BundleError

# Tokens of one call: more are no faster, and scores of more take more memory.
PREFILL_CHUNK = 256


class OnnxSession:
    """An open graph; see `backends.base.Session`.

    Args:
        context: largest number of positions.
        where: names the graph in messages.
    Raises:
        BundleError: graph and contract contradict each other.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        contract: GraphContract,
        *,
        context: int,
        where: Path,
    ) -> None:
        self._session = session
        self._where = where
        self._contract = contract
        self._io = session.io_binding()
        self._give_back = give_back_memory()
        self.chunk = min(PREFILL_CHUNK, contract.tokens_per_call or PREFILL_CHUNK)
        self._caches = _Caches(contract, context=context, chunk=self.chunk)
        self._states = _States(contract)
        self._position = 0
        self._last_count = 0

    def feed(
        self, vectors: Mapping[str, NDArray[np.float32]], count: int, *, keep: int
    ) -> NDArray[np.float32]:
        """Logits `[n, vocab]` after the next tokens; see `backends.base.Session.feed`."""
        shape = (keep or count, self._contract.vocab_size)
        logits: NDArray[np.float32] = np.empty(shape, dtype=np.float32)
        _bind_output(self._io, LOGITS_OUTPUT, logits[None])
        self._run(vectors, count, keep=keep)
        return logits

    def hidden(
        self, vectors: Mapping[str, NDArray[np.float32]], count: int, names: list[str]
    ) -> list[NDArray[np.float32]]:
        """Other outputs `[T, ...]` for the next tokens; for graphs without logits."""
        for name in names:
            self._io.bind_output(name, "cpu")
        self._run(vectors, count, keep=0)
        # In the order in which they were bound first: before the caches.
        return [value.numpy()[0] for value in self._io.get_outputs()[: len(names)]]

    def rewind(self, count: int) -> int:
        """Forget tokens of the last call; see `backends.base.Session.rewind`."""
        # Caches mask what lies behind the text, but a state has taken it in.
        forgotten = self._last_count if self._contract.states else count
        self._states.swap()
        self._position -= forgotten
        return forgotten

    def reset(self) -> None:
        """Forget the text so far."""
        self._position = 0
        self._states.clear()

    def _run(self, vectors: Mapping[str, NDArray[np.float32]], count: int, *, keep: int) -> None:
        begin = self._position
        self._caches.bind(self._io, positions=begin + count)
        self._states.bind(self._io)
        # The bound arrays must live until the run is over.
        inputs: dict[str, NDArray[Any]] = {
            lookup.name: np.ascontiguousarray(vectors[lookup.name], dtype=np.float32)[None]
            for lookup in self._contract.lookup_inputs
        }
        inputs[POSITION_IDS] = np.arange(begin, begin + count, dtype=np.int64)[None]
        inputs[NUM_LOGITS_TO_KEEP] = np.array(keep, dtype=np.int64)
        for name, array in inputs.items():
            _bind_input(self._io, name, array)
        # A piece of a prompt needs much memory, which the steps behind it would keep for nothing.
        options = self._give_back if count > 1 else None
        try:
            self._session.run_with_iobinding(self._io, options)
        except Exception as err:  # ONNX Runtime raises its own types, which share no base
            raise BundleError(
                f"`{self._where}` cannot be run: {err}",
                hint=VERIFY_HINT,
            ) from err
        self._states.swap()
        self._position += count
        self._last_count = count


def check_graph(session: ort.InferenceSession, contract: GraphContract, *, where: str) -> None:
    """Refuse a graph whose inputs and outputs are not those of the contract.

    Args:
        where: names the graph in the message.
    Raises:
        BundleError: names what differs.
    """
    expected = {lookup.name for lookup in contract.lookup_inputs}
    expected |= {held.input for held in contract.held}
    expected |= {POSITION_IDS, NUM_LOGITS_TO_KEEP}
    try:
        inputs = {value.name: value.shape for value in session.get_inputs()}
        outputs = {value.name: value.shape for value in session.get_outputs()}
    except UnicodeDecodeError as err:
        raise BundleError(
            f"`{where}` has a name that is no text: {err}",
            hint=VERIFY_HINT,
        ) from err
    names = (expected ^ set(inputs)) | ({LOGITS_OUTPUT} - set(outputs))
    for held in contract.held:
        if inputs.get(held.input) != held.shape or held.output not in outputs:
            names.add(held.input)
    names |= {name for c in contract.caches for name in c.shared_outputs} - set(outputs)
    names |= {n.name for n in contract.lookup_inputs if inputs.get(n.name) != n.shape}
    if outputs.get(LOGITS_OUTPUT, [])[-1:] != [contract.vocab_size]:
        names.add(LOGITS_OUTPUT)
    if names:
        raise BundleError(
            f"`{where}` and the manifest disagree about {', '.join(sorted(names))}",
            hint="files of two bundles may be mixed; copy the bundle again, or rebuild it",
        )


class _Caches:
    """The buffers that the graph reads and writes in place."""

    def __init__(self, contract: GraphContract, *, context: int, chunk: int) -> None:
        self._slots = Slots(contract, context=context, chunk=chunk)
        self._caches = contract.caches
        self._whole = self._slots.allocate()
        self._bound = [whole[:, :, :0] for whole in self._whole]

    def bind(self, io: ort.IOBinding, *, positions: int) -> None:
        """Make room for `positions` and bind every buffer as input and output."""
        grown = self._slots.grow(positions)
        if grown is None:
            return
        for i, (cache, slots) in enumerate(zip(self._caches, grown, strict=True)):
            old = self._bound[i]
            _, heads, held, width = old.shape
            # Heads lie one after the other, so those behind the first move up as slots are added.
            flat = self._whole[i].reshape(-1)[: heads * slots * width]
            new = flat.reshape(1, heads, slots, width)
            for head in reversed(range(1, heads)):
                new[0, head, :held] = old[0, head]
            self._bound[i] = new
            _bind_input(io, cache.input, new)
            for output in cache.outputs:
                _bind_output(io, output, new)


class _States:
    """What recurrent layers hand from call to call: two sets of buffers that change roles."""

    def __init__(self, contract: GraphContract) -> None:
        self._states = contract.states
        self._taken, self._given = (
            {s.input: np.zeros(s.shape, dtype=np.float32) for s in self._states} for _ in range(2)
        )

    def bind(self, io: ort.IOBinding) -> None:
        """Bind what the next call takes and gives."""
        for state in self._states:
            _bind_input(io, state.input, self._taken[state.input])
            _bind_output(io, state.output, self._given[state.input])

    def swap(self) -> None:
        """Take up what the call gave, or what it took."""
        self._taken, self._given = self._given, self._taken

    def clear(self) -> None:
        """Begin a text."""
        for array in self._taken.values():
            array.fill(0)


def _bind_input(io: ort.IOBinding, name: str, array: NDArray[Any]) -> None:
    io.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)


def _bind_output(io: ort.IOBinding, name: str, array: NDArray[Any]) -> None:
    io.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
