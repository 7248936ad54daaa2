"""Run a bundle: text in, text out. Needs no torch where the backend needs none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from pleexport.backends.registry import load
from pleexport.checksums import check_files
from pleexport.errors import BundleError, InputError
from pleexport.runtime import generation
from pleexport.runtime.bundle import Bundle
from pleexport.runtime.chat import Message
from pleexport.runtime.drafting import Drafter, open_drafter
from pleexport.runtime.generation_config import GenerationConfig
from pleexport.runtime.reader import Reader, Vectors
from pleexport.runtime.stats import Stats, Token
from pleexport.runtime.tokenizer import Tokenizer, open_tokenizer

Prompt = str | Sequence[int] | Sequence[Message]
_DEFAULT_TOKENS = 256


class Runner:
    """Generates text with a bundle, one text at a time.

    A call from another thread is refused while one is at work, and a text whose runner was used for
    another meanwhile does not go on. Any number of runners may be open on one bundle. A bundle that
    is replaced meanwhile, as a build with `overwrite` does it, goes on being the old one here.

    Args:
        bundle: a folder, or an open `Bundle`.
        threads: of the runtime; by default as many as there are cores.
        spin: whether threads of ONNX Runtime spin while they wait for work. That is fast where
            nothing else runs, and slow beside another busy process; by default as the target says.
        packed_weights: a folder that keeps weights as this processor wants them. They are written
            at the first use, which takes memory and time once; from then on they are mapped, which
            takes next to none.
        verify: compare what is loaded with its checksums; an open `Bundle` says so itself.
    Attributes:
        chunk: most tokens of one `feed`.
        stats: of the last call.
        config: how the last call generated: the checkpoint's defaults, and what was said otherwise.
    Raises:
        BundleError: the folder is not a bundle that this version reads.
        CheckFailed: files are damaged.
        InputError: an impossible number of threads, or a folder that cannot be used.
    """

    def __init__(
        self,
        bundle: Bundle | str | Path,
        *,
        threads: int = 0,
        spin: bool | None = None,
        packed_weights: str | Path | None = None,
        verify: bool = True,
    ) -> None:
        self.bundle = bundle if isinstance(bundle, Bundle) else Bundle(bundle, verify=verify)
        self.context = self.bundle.manifest.context
        self.blob = self.bundle.open_blob()
        if self.blob.source_digest != self.bundle.manifest.tables_digest:
            raise BundleError(
                f"`{self.blob.path}` is the blob of another bundle: its tables are not those of "
                "the manifest",
                hint="files of two bundles may be mixed; copy the bundle again, or rebuild it",
            )
        checksums = self.bundle.checksums
        if checksums:
            check_files(self.bundle.tokenizer_files.values(), checksums)
        self.tokenizer = open_tokenizer(self.bundle.tokenizer_files)
        self.stats = Stats()
        self.config = GenerationConfig()
        graph = self.bundle.decoder
        session = load(graph.backend).open_session(
            self.bundle.path,
            graph,
            context=self.context,
            threads=threads,
            spin=self.bundle.manifest.spin if spin is None else spin,
            packed_weights=None if packed_weights is None else Path(packed_weights),
            checksums=checksums,
        )
        self.chunk = session.chunk
        self._reader = Reader(self.blob, session, graph.contract, context=self.context)

    def logits(
        self, token_ids: Sequence[int], vectors: Vectors | None = None
    ) -> NDArray[np.float32]:
        """Logits at every position of a text, from a fresh state.

        Args:
            token_ids: T ids.
            vectors: by graph input, T looked-up vectors to use in place of the blob's.
        Returns:
            `[T, vocab]` float32.
        Raises:
            InputError: no ids, an id without a row, or more than the bundle's context.
        """
        ids = self.encode(token_ids)
        self.stats = Stats()
        with self._reader.alone():
            self._reader.reset()
            return self._reader.read(ids, keep=0, vectors=vectors)

    def feed(
        self, token_ids: Sequence[int], vectors: Vectors | None = None, *, keep: int = 1
    ) -> NDArray[np.float32]:
        """Logits `[n, vocab]` after the next tokens, at most `chunk` of them.

        Args:
            vectors: by graph input, what it takes for these tokens in place of the blob's.
            keep: n, how many of the last positions want logits; 0 for all.
        Raises:
            InputError: no tokens or too many, an id without a row, or an impossible `keep`.
        """
        if not 1 <= len(token_ids) <= self.chunk:
            raise InputError(
                f"{len(token_ids)} tokens at once; feed 1 to {self.chunk}",
                hint="`Runner.chunk` says how many one call takes",
            )
        if not 0 <= keep <= len(token_ids):
            raise InputError(
                f"keep is {keep}; it must be 0 to {len(token_ids)}", hint="0 keeps all logits"
            )
        with self._reader.alone():
            return self._reader.read(token_ids, keep=keep, vectors=vectors)

    def reset(self) -> None:
        """Forget the text so far."""
        with self._reader.alone():
            self._reader.reset()

    def generate(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        greedy: bool = False,
        seed: int | None = None,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
        draft: str | Drafter | None = None,
        template_arguments: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Iterator[Token]:
        """Continue a prompt, token by token.

        A prompt that begins with the whole text so far only has its new part read. What is not
        said here is as the checkpoint's `generation_config.json` had it, and where that says
        nothing either: greedy, up to 256 tokens.

        Args:
            prompt: text, token ids, or a conversation of `{"role", "content"}` for a bundle whose
                tokenizer has a chat template.
            temperature: 0 for the likeliest token each time; above 0 it samples.
            top_k, top_p, min_p: see `Sampling`.
            repetition_penalty: see `LogitRules`.
            greedy: the likeliest token each time, whatever the checkpoint says: nothing of its
                `generation_config.json` counts but the ends of a text.
            seed: makes sampling repeatable.
            stop: strings that end the text, beside the checkpoint's; they are not part of it.
            ignore_eos: go on past end-of-text ids, for timing.
            draft: "lookup" reads ahead what followed when the text had these words before, and so
                writes several tokens a call where it repeats itself; or a `Drafter` of your own.
            template_arguments: see `encode`.
            options: any other field of `GenerationConfig`.
        Raises:
            InputError: a prompt or option that cannot be used; before anything is generated.
        """
        if seed is not None and seed < 0:
            raise InputError(f"seed is {seed}; it must be 0 or more", hint="leave it out for any")
        if stop and self.tokenizer is None:
            raise InputError(
                "stop strings need a tokenizer, and this bundle has none",
                hint="leave them out, or build with `--tokenizer PATH`",
            )
        options |= {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
        }
        config = self._config(options, greedy=greedy)
        ids = self.encode(prompt, template_arguments)
        ends = frozenset(self.bundle.manifest.eos_token_ids)
        request = generation.Request(
            config=config,
            max_new_tokens=_room(config, len(ids)),
            seed=seed,
            stop=(*stop, *config.stops),
            eos=frozenset() if ignore_eos else ends,
            ends=ends,
            drafter=open_drafter(draft, chunk=self.chunk),
        )
        return self._generate(ids, request)

    def _config(self, options: dict[str, Any], *, greedy: bool) -> GenerationConfig:
        """The bundle's defaults, and what a call says otherwise."""
        given = {name: value for name, value in options.items() if value is not None}
        if greedy and given.get("temperature"):
            raise InputError(
                f"greedy text has no temperature, and {given['temperature']} was given",
                hint="leave one of the two out",
            )
        defaults = None if greedy else self.bundle.manifest.generation
        try:
            config = (defaults or GenerationConfig()).overridden(given)
        except msgspec.ValidationError as err:
            raise InputError(
                f"an option of generation cannot be used: {str(err).replace('$.', '')}",
                hint=f"known are {', '.join(GenerationConfig.__struct_fields__)}",
            ) from err
        if problem := config.out_of_range():
            raise InputError(problem, hint="leave it out for the default")
        return config

    def encode(
        self, prompt: Prompt, template_arguments: Mapping[str, Any] | None = None
    ) -> list[int]:
        """Token ids of a prompt.

        Args:
            template_arguments: what the chat template of a conversation may ask for by name:
                `tools`, `documents`, `enable_thinking` and the like. Where the last message is the
                assistant's, the answer goes on from there (`continue_final_message`); otherwise it
                begins (`add_generation_prompt`).
        Raises:
            InputError: text without a tokenizer, an empty prompt, or one beyond the context.
        """
        if isinstance(prompt, str):
            ids = self._tokenizer().encode(prompt)
        elif len(prompt) and isinstance(prompt[0], Mapping):
            ids = self._tokenizer().encode_chat(prompt, template_arguments)  # type: ignore[arg-type]
        else:
            ids = [int(i) for i in prompt]  # type: ignore[arg-type]
        if not ids:
            raise InputError("the prompt is empty", hint="pass at least one token")
        self._reader.check_length(len(ids))
        self.blob.row_ids(ids)
        return ids

    def _generate(self, ids: list[int], request: generation.Request) -> Iterator[Token]:
        # The statistics begin with the first token, not when the call was made: other calls may
        # have come in between.
        self.stats, self.config = Stats(), request.config
        yield from generation.generate(
            self._reader, self.blob, self.tokenizer, ids, request, self.stats
        )

    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise InputError("this bundle has no tokenizer", hint="pass token ids instead of text")
        return self.tokenizer


def _room(config: GenerationConfig, prompt_tokens: int) -> int:
    """How many tokens an answer may have."""
    if config.max_new_tokens is not None:
        return config.max_new_tokens
    if config.max_length is None:
        return _DEFAULT_TOKENS
    if prompt_tokens >= config.max_length:
        raise InputError(
            f"the prompt has {prompt_tokens} tokens, and by the checkpoint's generation config "
            f"prompt and answer have {config.max_length} at most",
            hint="say how long the answer may be with `--max-new-tokens`",
        )
    return config.max_length - prompt_tokens
