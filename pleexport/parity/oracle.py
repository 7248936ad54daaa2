"""The PyTorch original that a bundle is compared with.

It is `transformers`' own model, or for families that no library has, a plain reference written
from the published math, in `pleexport/references`.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pleexport.checkpoint.adapters.adapted import AdaptedCheckpoint
from pleexport.checkpoint.checkpoint import Checkpoint
from pleexport.checkpoint.compressed_tensors import CompressedTensors
from pleexport.checkpoint.matching import MatchedModel
from pleexport.checkpoint.quantized import read_quantization
from pleexport.dtypes import FLOATS, numpy_dtype, torch_name
from pleexport.errors import CheckpointError, MissingDependencyError, PleexportError
from pleexport.model import Reference, Table, TransformersOriginal
from pleexport.progress import quiet

if TYPE_CHECKING:
    from torch import Tensor

# torch warns of torchao, which transformers imports where it is installed.
_LOGGERS = ("transformers", "torch.utils._pytree")
_SAID = 300


class Oracle(Protocol):
    """The original, whoever implements it."""

    name: str

    def logits(
        self,
        token_ids: Sequence[int],
        vectors: Mapping[str, NDArray[np.float32]] | None = None,
        *,
        keep: int = 0,
    ) -> NDArray[np.float32]:
        """Logits `[T, vocab]` of a text of T tokens, or of its last positions.

        Args:
            vectors: by graph input, T looked-up vectors to use in place of the model's own tables.
            keep: how many of the last positions want logits; 0 for all.
        """
        ...

    def hidden(self, token_ids: Sequence[int]) -> list[NDArray[np.float32]]:
        """What each layer hands on: `[T, H]`, or `[T, S, H]` of S streams that run side by side."""
        ...

    def without_activation_rounding(self) -> AbstractContextManager[None]:
        """Leave activations as they are while the context lasts."""
        ...


def open_oracle(matched: MatchedModel) -> Oracle:
    """The original of a checkpoint.

    Raises:
        MissingDependencyError: what it needs is not installed.
        CheckpointError: transformers does not find all weights in the checkpoint.
    """
    model, checkpoint = matched.model, matched.checkpoint
    if model.transformers is not None:
        return TransformersOracle(checkpoint, original=model.transformers, matched=matched)
    assert model.reference is not None, "a model has one of the two"
    return StepOracle(model.reference(CheckpointTensors(checkpoint), checkpoint.config))


class CheckpointTensors(Mapping[str, "Tensor"]):
    """A checkpoint's tensors by name, as views of the mapped files.

    Those that are stored in another dtype than a config names are copies, rounded to it, as the
    original does when it loads them.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._rounded: dict[str, NDArray[Any]] = {}

    def __getitem__(self, name: str) -> Tensor:
        return _as_tensor(self._array(name))

    def _array(self, name: str) -> NDArray[Any]:
        array = self._checkpoint.array(name)
        dtype = numpy_dtype(self._checkpoint.dtype)
        if not self._checkpoint.config or array.dtype == dtype:
            return array
        if name not in self._rounded:
            self._rounded[name] = array.astype(dtype)
        return self._rounded[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._checkpoint.entries)

    def __len__(self) -> int:
        return len(self._checkpoint.entries)


def _as_tensor(array: NDArray[Any]) -> Tensor:
    """A view of an array that nobody may write to."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch would warn of that
        if array.dtype == numpy_dtype("bf16"):
            return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
        return torch.from_numpy(array)


class StepOracle:
    """A plain reference, run token by token."""

    def __init__(self, reference: Reference) -> None:
        self.name = reference.name
        self._reference = reference

    def logits(
        self,
        token_ids: Sequence[int],
        vectors: Mapping[str, NDArray[np.float32]] | None = None,
        *,
        keep: int = 0,
    ) -> NDArray[np.float32]:
        """See `Oracle.logits`."""
        first = len(token_ids) - keep if keep else 0
        steps = enumerate(self._steps(token_ids, vectors))
        return np.stack([logits.numpy() for i, (logits, _) in steps if i >= first])

    def hidden(self, token_ids: Sequence[int]) -> list[NDArray[np.float32]]:
        """See `Oracle.hidden`; one stream."""
        tokens = [[h.numpy() for h in hidden] for _, hidden in self._steps(token_ids, None)]
        return [np.stack(layer) for layer in zip(*tokens, strict=True)]

    def without_activation_rounding(self) -> AbstractContextManager[None]:
        """See `Oracle`; no reference rounds any."""
        return nullcontext()

    def _steps(
        self, token_ids: Sequence[int], vectors: Mapping[str, NDArray[np.float32]] | None
    ) -> Iterator[tuple[Tensor, list[Tensor]]]:
        import torch

        state = self._reference.start()
        for i, token_id in enumerate(token_ids):
            if vectors is None:
                given = self._reference.vectors(token_id)
            else:
                given = {name: torch.from_numpy(array[i]) for name, array in vectors.items()}
            yield self._step(given, state)

    def _step(self, vectors: Mapping[str, Tensor], state: Any) -> tuple[Tensor, list[Tensor]]:
        import torch

        with torch.no_grad():
            return self._reference.step(vectors, state)


class TransformersOracle:
    """`transformers`' implementation, loaded in the checkpoint's dtype and widened to float32.

    The order matters: constants such as the embedding scale are rounded to the checkpoint's dtype
    by the original, and stay so. Large weights stay in the mapped files, and are widened where
    they are used.

    Args:
        original: how the checkpoint's family says that it is loaded.
        matched: for a quantized checkpoint, what its codes stand for.
    Raises:
        MissingDependencyError: transformers is not installed.
        CheckpointError: transformers does not find all weights in the checkpoint, or refuses it.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        original: TransformersOriginal,
        matched: MatchedModel | None = None,
    ) -> None:
        try:
            import torch
            import transformers

            from pleexport.parity.widening import widen_where_used
        except ImportError as err:
            raise MissingDependencyError(
                f"comparing with the PyTorch original needs {err.name}",
                hint="pip install 'pleexport[export]'",
            ) from err
        self._torch = torch
        self.name = f"transformers {transformers.__version__}"
        self._original, self._path = original, checkpoint.path
        with self._in_one_sentence("load"):
            if matched and isinstance(read_quantization(checkpoint.config), CompressedTensors):
                self._model = self._load_with_codes(matched).eval()
            elif matched and isinstance(checkpoint, AdaptedCheckpoint):
                loaded, merged_by = self._load_merged(matched, checkpoint)
                self._model = loaded.eval()
                self.name += f", adapters merged by {merged_by}"
            else:
                with _scales_of(matched.model.tables if matched else ()):
                    self._model = self._load(checkpoint).eval()
            widen_where_used(self._model)
        for module in self._model.modules():
            if hasattr(module, "embedding_quantized"):
                module.output_dtype = torch.float32  # it is no parameter, and not widened
        self._layers = self._model.get_decoder().layers

    def logits(
        self,
        token_ids: Sequence[int],
        vectors: Mapping[str, NDArray[np.float32]] | None = None,
        *,
        keep: int = 0,
    ) -> NDArray[np.float32]:
        """See `Oracle.logits`."""
        with self._in_one_sentence("run"), self._torch.no_grad(), quiet(*_LOGGERS):
            return self._call(token_ids, vectors, keep)

    def hidden(self, token_ids: Sequence[int]) -> list[NDArray[np.float32]]:
        """See `Oracle.hidden`."""
        found: list[NDArray[np.float32]] = []
        stream_axis = self._original.stream_axis

        def record(_module: Any, _inputs: Any, output: Any) -> None:
            tensor: Tensor = output[0] if isinstance(output, tuple) else output
            # Streams go behind the positions, where our graphs have them.
            if stream_axis is not None:
                tensor = tensor.movedim(stream_axis, 2)
            found.append(tensor[0].numpy(force=True).copy())

        hooks = [layer.register_forward_hook(record) for layer in self._layers]
        try:
            with self._in_one_sentence("run"), self._torch.no_grad(), quiet(*_LOGGERS):
                ids = self._torch.tensor([list(token_ids)])
                self._model.get_decoder()(input_ids=ids, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        return found

    @contextmanager
    def without_activation_rounding(self) -> Iterator[None]:
        """See `Oracle`; a scale of 0 rounds nothing."""
        named = self._model.named_parameters()
        scales = [scale for name, scale in named if name.endswith("_activation_scale")]
        kept = [scale.data for scale in scales]
        for scale in scales:
            scale.data = self._torch.zeros_like(scale.data)
        try:
            yield
        finally:
            for scale, own in zip(scales, kept, strict=True):
                scale.data = own

    @contextmanager
    def _in_one_sentence(self, verb: str) -> Iterator[None]:
        """Say in a sentence what transformers raises, which may be anything."""
        try:
            yield
        except PleexportError:
            raise
        except Exception as err:
            said = " ".join(str(err).split()) or type(err).__name__
            said = said if len(said) <= _SAID else f"{said[:_SAID]} ..."
            raise CheckpointError(
                f"{self.name} cannot {verb} the original in `{self._path}`: {said}",
                hint="mend what it says, or build with `--no-verify`, which compares with nothing",
            ) from err

    def _call(
        self,
        token_ids: Sequence[int],
        vectors: Mapping[str, NDArray[np.float32]] | None,
        keep: int,
    ) -> NDArray[np.float32]:
        inputs: dict[str, Any] = {"input_ids": self._torch.tensor([list(token_ids)])}
        if vectors is not None:
            inputs = {name: self._torch.from_numpy(v)[None] for name, v in vectors.items()}
        output = self._model(**inputs, use_cache=False, logits_to_keep=keep)
        logits: NDArray[np.float32] = output.logits[0].numpy(force=True)
        return logits

    def _load(self, checkpoint: Checkpoint) -> Any:
        """Load the text model alone, also of a multimodal checkpoint.

        transformers finds the files of a folder by itself. It is given tensors where it would find
        others, or by other names.
        """
        import transformers

        if not checkpoint.read_by_transformers:
            tensors = {name: _as_tensor(checkpoint.array(name)) for name in checkpoint.entries}
            return self._load_tensors(checkpoint, tensors)
        with _quiet_transformers():
            config = transformers.AutoConfig.for_model(**self._config_fields(checkpoint))
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                str(checkpoint.path),
                config=config,
                local_files_only=True,
                **self._loading(checkpoint),
            )
        _check_missing(info, checkpoint)
        return model

    def _load_with_codes(self, matched: MatchedModel) -> Any:
        """Load the text model of a checkpoint whose codes `transformers` does not read itself."""
        import transformers

        from pleexport.parity.coded import compute_with_codes, stand_ins

        checkpoint, filled = matched.checkpoint, stand_ins(matched)
        fields = self._config_fields(checkpoint)
        fields.pop("quantization_config", None)
        tensors = CheckpointTensors(checkpoint)
        of_codes = {name.removesuffix("weight") for name in filled}
        plain = {
            name: tensors[name]
            for name, entry in checkpoint.entries.items()
            if entry.dtype in FLOATS
            and f"{name.rpartition('.')[0]}." not in of_codes
            and matched.model.ignored_part(name) is None
            and name not in matched.ignored
        }
        with _quiet_transformers():
            config = transformers.AutoConfig.for_model(**fields)
            model, info = self._made_of(plain | filled, config, checkpoint)
        _check_missing(info, checkpoint)
        compute_with_codes(model, matched)
        return model

    def _load_merged(self, matched: MatchedModel, checkpoint: AdaptedCheckpoint) -> tuple[Any, str]:
        """Load the text model with adapters merged, and say by whom."""
        from pleexport.parity import merged, merged_by_peft

        if merged_by_peft.can_merge(checkpoint):
            base = checkpoint.base
            tensors = merged_by_peft.writable(self._plain(matched, base), checkpoint)
            model = self._load_tensors(base, tensors)
            with _quiet_transformers(), suppress(Exception):  # of whatever version it is
                return merged_by_peft.merge(model, checkpoint)
        stand_ins = merged.merged_when_used(matched)
        tensors = {**self._plain(matched, checkpoint, besides=stand_ins), **stand_ins}
        model = self._load_tensors(checkpoint, tensors)
        merged.compute_merged(model, matched)
        return model, "pleexport"

    def _plain(
        self, matched: MatchedModel, checkpoint: Checkpoint, *, besides: Container[str] = ()
    ) -> dict[str, Tensor]:
        """The tensors of the text model as numbers."""
        tensors = CheckpointTensors(checkpoint)
        return {
            name: tensors[name]
            for name in checkpoint.entries
            if name not in besides
            and matched.model.ignored_part(name) is None
            and name not in matched.ignored
        }

    def _load_tensors(self, checkpoint: Checkpoint, tensors: dict[str, Tensor]) -> Any:
        """Load the text model from tensors that are here already."""
        import transformers

        with _quiet_transformers():
            config = transformers.AutoConfig.for_model(**self._config_fields(checkpoint))
            model, info = self._made_of(tensors, config, checkpoint)
        _check_missing(info, checkpoint)
        return model

    def _made_of(
        self, tensors: Mapping[str, Tensor], config: Any, checkpoint: Checkpoint
    ) -> tuple[Any, Mapping[str, Any]]:
        import transformers

        made = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        loaded: tuple[Any, Mapping[str, Any]] = made.from_pretrained(
            None, config=config, state_dict=dict(tensors), **self._loading(checkpoint)
        )
        return loaded

    def _loading(self, checkpoint: Checkpoint) -> dict[str, Any]:
        return {
            "key_mapping": dict(self._original.key_mapping),
            "dtype": getattr(self._torch, torch_name(checkpoint.dtype)),
            "output_loading_info": True,
        }

    def _config_fields(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """The text model's config, as its class in transformers wants it."""
        original, fields = self._original, dict(checkpoint.text_config)
        for name, default in original.inherited.items():
            fields.setdefault(name, checkpoint.config.get(name, default))
        for name in original.float_fields & fields.keys():
            if type(fields[name]) is int:
                fields[name] = float(fields[name])
        rules = checkpoint.config.get("quantization_config")
        if rules is not None:
            text = json.dumps(rules)
            for name, own in original.renamed_modules.items():
                text = text.replace(name, own)
            fields["quantization_config"] = json.loads(text)
        return fields | {"model_type": original.model_type}


def _check_missing(info: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    """Refuse a model that lacks tensors.

    Raises:
        CheckpointError: names the first.
    """
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(
            f"transformers does not find `{missing[0]}` and {len(missing) - 1} other tensors "
            f"in `{checkpoint.path}`, so it cannot serve as the reference",
            hint="build with `--no-verify`, or rename the tensors as transformers has them",
        )


@contextmanager
def _scales_of(tables: Sequence[Table]) -> Iterator[None]:
    """Let transformers load one scale a layer of a quantized table.

    Its module declares one scale a row, whatever the checkpoint has, and refuses another shape.
    """
    quantized = {
        (t.rows, t.row_width): t.row_width // t.codes.group_size for t in tables if t.codes
    }
    if not quantized:
        yield
        return
    import torch
    from transformers.integrations import gemma_quant

    declared = gemma_quant.QuantizedEmbedding

    class WithScales(declared):  # type: ignore[misc, valid-type]
        def __init__(
            self, num_embeddings: int, embedding_dim: int, *args: Any, **options: Any
        ) -> None:
            super().__init__(num_embeddings, embedding_dim, *args, **options)
            groups = quantized.get((num_embeddings, embedding_dim), 1)
            scales = torch.ones(num_embeddings, groups, dtype=torch.float32)
            self.embedding_scale = torch.nn.Parameter(scales)

    gemma_quant.QuantizedEmbedding = WithScales
    try:
        yield
    finally:
        gemma_quant.QuantizedEmbedding = declared


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Let transformers say errors only and draw no bars, and give it back as it was.

    A hook on its bars, because switching them off is for everybody and has no way back to what an
    environment variable says.
    """
    import transformers

    def without_bar(
        make_bar: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]
    ) -> Any:
        return make_bar(*args, **options | {"disable": True})

    hook_before = transformers.logging.set_tqdm_hook(without_bar)
    try:
        with quiet(*_LOGGERS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_tqdm_hook(hook_before)
