"""Execute a bundle with ONNX Runtime: look rows up, feed the graph, generate. Needs no torch."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from pleexport.backends.onnx.session import open_session
from pleexport.contract import (
    LOGITS_OUTPUT,
    NUM_LOGITS_TO_KEEP,
    POSITION_IDS,
    CacheInput,
    GraphContract,
)
from pleexport.errors import BundleError, RunnerError
from pleexport.process import memory, page_faults
from pleexport.runtime.blob import Blob
from pleexport.runtime.blob_layout import align
from pleexport.runtime.bundle import Bundle
from pleexport.runtime.sampling import Sampling
from pleexport.runtime.tokenizer import StopStrings, Text, open_text, tokenizer_files

PREFILL_CHUNK = 256
_FIRST_POSITIONS = 256
_NUMPY_DTYPES = {"fp32": np.float32, "fp16": np.float16, "int8": np.int8}
Prompt = str | Sequence[int] | Sequence[dict[str, str]]


@dataclass(frozen=True)
class Token:
    """A generated token.

    Attributes:
        text: the whole characters that it completes, "" while one is incomplete.
    """

    id: int
    text: str


@dataclass
class Stats:
    """What the last call took.

    Attributes:
        finish_reason: "eos", "stop", "length" (max_new_tokens) or "context"; "" while it runs.
        prompt_tokens: tokens that were prefilled; those of an earlier turn are not read again.
        first_token_seconds: from the call to the first token.
        rows: rows looked up.
        row_bytes: bytes of these rows in the blob.
        pages: distinct pages of the blob that these rows lie on.
        anonymous_bytes, file_backed_bytes: resident memory at the end; None where not known.
    """

    finish_reason: str = ""
    prompt_tokens: int = 0
    generated_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    first_token_seconds: float = 0.0
    rows: int = 0
    row_bytes: int = 0
    pages: int = 0
    minor_page_faults: int = 0
    major_page_faults: int = 0
    anonymous_bytes: int | None = None
    file_backed_bytes: int | None = None

    @property
    def prefill_tokens_per_second(self) -> float:
        """Prompt tokens per second."""
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens per second after the first."""
        return (self.generated_tokens - 1) / self.decode_seconds if self.decode_seconds else 0.0


class _Caches:
    """The buffers that the graph reads and writes in place.

    Each has its address space for the whole context from the start, of which nothing is in memory
    until it is used. The slots that the graph is told of double with the text, since it looks at
    every block of them; those of window layers up to the size of their ring, which is reached
    before a position wraps around.
    """

    def __init__(self, contract: GraphContract, *, context: int, chunk: int) -> None:
        windows = [cache.window for cache in contract.caches if cache.window is not None]
        # A chunk's first token must still find its window after the whole chunk was written.
        ring = min(max(windows, default=1) + chunk - 1, context)
        self._caches = contract.caches
        self._most = {c.input: context if c.window is None else ring for c in contract.caches}
        self._whole = {c.input: allocate(c, self._most[c.input]) for c in contract.caches}
        self._bound = {c.input: self._whole[c.input][:, :, :0] for c in contract.caches}
        self._positions = 0

    def bind(self, binding: ort.IOBinding, *, positions: int) -> None:
        """Make room for `positions` and bind every buffer as input and output."""
        if positions <= self._positions:
            return
        self._positions = max(_FIRST_POSITIONS, 2 * self._positions, positions)
        for cache in self._caches:
            slots = _slots(cache, min(self._positions, self._most[cache.input]))
            whole, old = self._whole[cache.input], self._bound[cache.input]
            _, heads, held, width = old.shape
            new = whole.reshape(-1)[: heads * slots * width].reshape(1, heads, slots, width)
            for head in reversed(range(1, heads)):
                new[0, head, :held] = old[0, head]
            self._bound[cache.input] = new
            _bind_input(binding, cache.input, new)
            _bind_output(binding, cache.output, new)


class _States:
    """What recurrent layers hand from call to call: two sets of buffers that change roles."""

    def __init__(self, contract: GraphContract) -> None:
        self._states = contract.states
        self._taken, self._given = (
            {s.input: np.zeros(s.shape, dtype=np.float32) for s in self._states} for _ in range(2)
        )

    def bind(self, binding: ort.IOBinding) -> None:
        """Bind what the next call takes and gives."""
        for state in self._states:
            _bind_input(binding, state.input, self._taken[state.input])
            _bind_output(binding, state.output, self._given[state.input])

    def advance(self) -> None:
        """Take up what the call gave."""
        self._taken, self._given = self._given, self._taken

    def clear(self) -> None:
        """Begin a text."""
        for array in self._taken.values():
            array.fill(0)


class Runner:
    """Generates text with a bundle.

    Args:
        bundle: a folder, or an open `Bundle`.
        threads: of ONNX Runtime; by default as many as there are cores.
        packed_weights: a folder that keeps weights as this processor wants them. They are written
            at the first use, which takes memory and time once; from then on they are mapped, which
            takes next to none.
    Raises:
        BundleError: the folder is not a bundle that this version reads.
        CheckFailed: files are damaged.
        RunnerError: an impossible number of threads, or a folder that cannot be used.
    """

    def __init__(
        self,
        bundle: Bundle | str | Path,
        *,
        threads: int = 0,
        packed_weights: str | Path | None = None,
    ) -> None:
        self.bundle = bundle if isinstance(bundle, Bundle) else Bundle(bundle)
        manifest = self.bundle.manifest
        self.context = manifest.context
        self.blob = Blob(self.bundle.blob_path)
        self.text = open_text(tokenizer_files(self.bundle.path))
        self.stats = Stats()
        self._contract = manifest.contract
        self._session = open_session(
            self.bundle,
            threads=threads,
            packed_weights=None if packed_weights is None else Path(packed_weights),
        )
        self._binding = self._session.io_binding()
        self._check_inputs()
        self.chunk = min(PREFILL_CHUNK, self._contract.tokens_per_call or PREFILL_CHUNK)
        self._caches = _Caches(self._contract, context=self.context, chunk=self.chunk)
        self._states = _States(self._contract)
        lookups = self._contract.lookup_inputs
        self._whole_text = {lookup.table for lookup in lookups if lookup.whole_text}
        self._ids: list[int] = []
        self._rows_read: list[NDArray[np.int64]] = []

    def logits(
        self,
        token_ids: Sequence[int],
        vectors: Mapping[str, NDArray[np.float32]] | None = None,
    ) -> NDArray[np.float32]:
        """Logits at every position of a text, from a fresh state.

        Args:
            token_ids: T ids.
            vectors: by table, T looked-up vectors to use in place of the blob's.
        Returns:
            `[T, vocab]` float32.
        Raises:
            RunnerError: no ids, an id without a row, or more than the bundle's context.
        """
        ids = self.encode(token_ids)
        self.reset()
        self.stats = Stats()
        return self._prefill(ids, keep=0, vectors=vectors)

    def feed(
        self,
        token_ids: Sequence[int],
        vectors: Mapping[str, NDArray[np.float32]] | None = None,
        *,
        keep: int = 1,
    ) -> NDArray[np.float32]:
        """Logits `[n, vocab]` after the next tokens, at most `chunk` of them.

        Args:
            vectors: by table, what the graph takes for these tokens in place of the blob's.
            keep: n, how many of the last positions want logits; 0 for all.
        Raises:
            RunnerError: no tokens or too many, an id without a row, or an impossible `keep`.
        """
        if not 1 <= len(token_ids) <= self.chunk:
            raise RunnerError(f"{len(token_ids)} tokens at once; feed 1 to {self.chunk}")
        if not 0 <= keep <= len(token_ids):
            raise RunnerError(f"keep is {keep}; it must be 0 to {len(token_ids)}")
        rows = self.blob.row_ids(token_ids)
        if vectors is None:
            # Page faults, one after the other, would take forty times as long from a cold disk.
            self.blob.prefetch(rows)
        return self._feed(rows, token_ids, keep=keep, vectors=vectors)

    def reset(self) -> None:
        """Forget the text so far."""
        self._ids = []
        self._rows_read.clear()
        self._states.clear()

    def generate(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
    ) -> Iterator[Token]:
        """Continue a prompt, token by token.

        A prompt that begins with the whole text so far only has its new part read.

        Args:
            prompt: text, token ids, or a conversation of `{"role", "content"}` for a bundle whose
                tokenizer has a chat template.
            temperature, top_k, top_p, min_p, repetition_penalty: see `Sampling`.
            seed: makes sampling repeatable.
            stop: strings that end the text; they are not part of it.
            ignore_eos: go on past end-of-text ids, for timing.
        Raises:
            RunnerError: a prompt or option that cannot be used; before anything is generated.
        """
        sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
        if seed is not None and seed < 0:
            raise RunnerError(f"seed is {seed}; it must be 0 or more")
        if max_new_tokens < 1:
            raise RunnerError(f"max_new_tokens is {max_new_tokens}; it must be 1 or more")
        if stop and self.text is None:
            raise RunnerError("stop strings need a tokenizer, and this bundle has none")
        return self._generate(
            self.encode(prompt),
            sampling,
            max_new_tokens=max_new_tokens,
            generator=np.random.default_rng(seed),
            stops=StopStrings(stop),
            eos=frozenset() if ignore_eos else frozenset(self.bundle.manifest.eos_token_ids),
        )

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt.

        Raises:
            RunnerError: text without a tokenizer, an empty prompt, or one beyond the context.
        """
        if isinstance(prompt, str):
            ids = self._tokenizer().encode(prompt)
        elif len(prompt) and isinstance(prompt[0], dict):
            ids = self._tokenizer().encode_chat(prompt)  # type: ignore[arg-type]
        else:
            ids = [int(i) for i in prompt]  # type: ignore[arg-type]
        if not ids:
            raise RunnerError("the prompt is empty", hint="pass at least one token")
        self._check_length(len(ids))
        self.blob.row_ids(ids)
        return ids

    def _generate(
        self,
        ids: list[int],
        sampling: Sampling,
        *,
        max_new_tokens: int,
        generator: np.random.Generator,
        stops: StopStrings,
        eos: frozenset[int],
    ) -> Iterator[Token]:
        started, faults = time.perf_counter(), page_faults()
        # Now, not when the call was made: other calls may have fed tokens in between.
        known = len(self._ids)
        if not (known and known < len(ids) and ids[:known] == self._ids):
            self.reset()
        stats = self.stats = Stats()
        self._rows_read.clear()
        new_ids = ids[len(self._ids) :]
        stats.prompt_tokens = len(new_ids)
        logits = self._prefill(new_ids, keep=1)[-1]
        stats.prefill_seconds = time.perf_counter() - started
        stream = self.text.stream(ids) if self.text else None
        first_at = 0.0
        for count in range(1, max_new_tokens + 1):
            token_id = sampling.choose(logits, ids, generator)
            stats.generated_tokens = count
            if count == 1:
                first_at = time.perf_counter()
                stats.first_token_seconds = first_at - started
            if token_id in eos:
                stats.finish_reason = "eos"
                break
            ids.append(token_id)
            text = stops.push(stream.push(token_id)) if stream else ""
            if stops.hit:
                stats.finish_reason = "stop"
            elif count == max_new_tokens:
                stats.finish_reason = "length"
            elif len(ids) > self.context - 1:
                stats.finish_reason = "context"
            text += stops.flush() if stats.finish_reason in ("length", "context") else ""
            self._finish(stats, first_at, faults)
            yield Token(token_id, text)
            if stats.finish_reason:
                return
            logits = self.feed([token_id])[0]
        held = stops.flush()
        self._finish(stats, first_at, faults)
        if held:
            yield Token(token_id, held)

    def _finish(self, stats: Stats, first_at: float, faults: tuple[int, int]) -> None:
        stats.decode_seconds = time.perf_counter() - first_at
        minor, major = page_faults()
        stats.minor_page_faults, stats.major_page_faults = minor - faults[0], major - faults[1]
        if stats.finish_reason:
            stats.pages = self.blob.pages(np.concatenate(self._rows_read))
            now = memory()
            stats.anonymous_bytes, stats.file_backed_bytes = now.anonymous, now.file_backed

    def _prefill(
        self,
        ids: list[int],
        *,
        keep: int,
        vectors: Mapping[str, NDArray[np.float32]] | None = None,
    ) -> NDArray[np.float32]:
        """Feed ids in chunks; logits of all positions, or of the last one (`keep` 1)."""
        rows = self.blob.row_ids(ids)
        self.blob.prefetch(rows)
        parts = []
        for begin in range(0, len(ids), self.chunk):
            chunk = slice(begin, begin + self.chunk)
            given = None
            if vectors is not None:
                text = slice(chunk.stop)
                given = {
                    lookup.table: vectors[lookup.table][text if lookup.whole_text else chunk]
                    for lookup in self._contract.lookup_inputs
                }
            parts.append(self._feed(rows[chunk], ids[chunk], keep=keep, vectors=given))
        return np.concatenate(parts) if keep == 0 else parts[-1]

    def _feed(
        self,
        rows: NDArray[np.int64],
        ids: Sequence[int],
        *,
        keep: int,
        vectors: Mapping[str, NDArray[np.float32]] | None = None,
    ) -> NDArray[np.float32]:
        """Run the graph on the next tokens."""
        begin, count = len(self._ids), len(ids)
        self._check_length(begin + count)
        self._caches.bind(self._binding, positions=begin + count)
        self._states.bind(self._binding)
        vectors = vectors or self._vectors(rows)
        # The bound arrays must live until the run is over.
        inputs: dict[str, NDArray[Any]] = {
            lookup.name: np.ascontiguousarray(vectors[lookup.table], dtype=np.float32)[None]
            for lookup in self._contract.lookup_inputs
        }
        inputs[POSITION_IDS] = np.arange(begin, begin + count, dtype=np.int64)[None]
        inputs[NUM_LOGITS_TO_KEEP] = np.array(keep, dtype=np.int64)
        for name, array in inputs.items():
            _bind_input(self._binding, name, array)
        shape = (keep or count, self._contract.vocab_size)
        logits: NDArray[np.float32] = np.empty(shape, dtype=np.float32)
        _bind_output(self._binding, LOGITS_OUTPUT, logits[None])
        self._session.run_with_iobinding(self._binding)
        self._states.advance()
        self._ids.extend(int(i) for i in ids)
        self.stats.rows += count
        self.stats.row_bytes += count * self.blob.row_stride
        self._rows_read.append(rows)
        return logits

    def _vectors(self, rows: NDArray[np.int64]) -> dict[str, NDArray[np.float32]]:
        """By table, what the graph takes for new tokens."""
        if not self._whole_text:
            return self.blob.lookup(rows)
        text = np.concatenate((self.blob.row_ids(self._ids), rows))
        new = self.blob.lookup(rows, self.blob.shapes.keys() - self._whole_text)
        return new | self.blob.lookup(text, self._whole_text)

    def _tokenizer(self) -> Text:
        if self.text is None:
            raise RunnerError("this bundle has no tokenizer", hint="pass token ids instead of text")
        return self.text

    def _check_length(self, length: int) -> None:
        if length > self.context:
            raise RunnerError(
                f"{length} tokens exceed the bundle's context of {self.context}",
                hint="shorten the prompt, or build with a larger `--context`",
            )

    def _check_inputs(self) -> None:
        """Refuse a graph, a manifest and a blob that do not fit each other."""
        expected = {lookup.name for lookup in self._contract.lookup_inputs}
        expected |= {cache.input for cache in self._contract.caches}
        expected |= {state.input for state in self._contract.states}
        expected |= {POSITION_IDS, NUM_LOGITS_TO_KEEP}
        inputs = {value.name: value.shape for value in self._session.get_inputs()}
        outputs = {value.name: value.shape for value in self._session.get_outputs()}
        names = (expected ^ set(inputs)) | ({LOGITS_OUTPUT} - set(outputs))
        for held in self._contract.held:
            if inputs.get(held.input) != held.shape or held.output not in outputs:
                names.add(held.input)
        names |= {n.name for n in self._contract.lookup_inputs if inputs.get(n.name) != n.shape}
        if outputs.get(LOGITS_OUTPUT, [None])[-1] != self._contract.vocab_size:
            names.add(LOGITS_OUTPUT)
        if names:
            raise BundleError(
                f"`{self.bundle.graph_path}` and the manifest disagree about "
                f"{', '.join(sorted(names))}"
            )
        widths = self.blob.shapes
        for lookup in self._contract.lookup_inputs:
            if widths.get(lookup.table) != tuple(lookup.shape[2:]):
                raise BundleError(
                    f"`{self.blob.path}` has no table `{lookup.table}` of shape {lookup.shape[2:]}"
                )


def allocate(cache: CacheInput, positions: int) -> NDArray[Any]:
    """Zeros for at least `positions` slots of a cache; masked slots must hold finite numbers."""
    sizes = [n if isinstance(n, int) else _slots(cache, positions) for n in cache.shape]
    return np.zeros(sizes, dtype=_NUMPY_DTYPES[cache.dtype])


def _slots(cache: CacheInput, positions: int) -> int:
    return align(positions, cache.block)


def _bind_input(binding: ort.IOBinding, name: str, array: NDArray[Any]) -> None:
    binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)


def _bind_output(binding: ort.IOBinding, name: str, array: NDArray[Any]) -> None:
    binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
