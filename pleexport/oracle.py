"""The PyTorch original that a bundle is compared with: `transformers`' own model."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pleexport.binding import Binding
from pleexport.errors import CheckpointError, MissingDependencyError

if TYPE_CHECKING:
    from torch import Tensor

TORCH_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class TransformersOracle:
    """`transformers`' implementation, loaded in the checkpoint's dtype and raised to float32.

    The order matters: constants such as the embedding scale are rounded to the checkpoint's dtype
    by the original, and stay so.

    Raises:
        MissingDependencyError: transformers is not installed.
        CheckpointError: transformers does not find all weights in the checkpoint.
    """

    def __init__(self, binding: Binding) -> None:
        try:
            import torch
            import transformers
        except ImportError as err:
            raise MissingDependencyError(
                f"comparing with the PyTorch original needs {err.name}",
                hint="pip install 'pleexport[export]'",
            ) from err
        self._torch = torch
        self.name = f"transformers {transformers.__version__}"
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        logging.getLogger("transformers").setLevel(logging.ERROR)
        self._model = self._load(binding).float().eval()
        self._layers = self._model.get_decoder().layers

    def logits(
        self,
        token_ids: Sequence[int],
        vectors: Mapping[str, NDArray[np.float32]] | None = None,
    ) -> NDArray[np.float32]:
        """Logits `[T, vocab]` of a text.

        Args:
            vectors: looked-up vectors by graph input, to use in place of the model's own tables.
        """
        with self._torch.no_grad():
            return self._call(token_ids, vectors)

    def hidden(self, token_ids: Sequence[int]) -> list[NDArray[np.float32]]:
        """What each layer hands on: `[T, ...]` float32, AltUp streams on the second axis."""
        found: list[NDArray[np.float32]] = []

        def record(_module: Any, _inputs: Any, output: Any) -> None:
            tensor: Tensor = output[0] if isinstance(output, tuple) else output
            if tensor.ndim == 4:  # transformers stacks streams first
                tensor = tensor.movedim(0, 2)
            found.append(tensor[0].numpy(force=True).copy())

        hooks = [layer.register_forward_hook(record) for layer in self._layers]
        try:
            self.logits(token_ids)
        finally:
            for hook in hooks:
                hook.remove()
        return found

    def generate(self, token_ids: Sequence[int], count: int) -> list[int]:
        """The `count` ids that greedy decoding adds, end-of-text ids not ending it."""
        config = self._model.generation_config
        config.eos_token_id = None
        with self._torch.no_grad():
            ids = self._model.generate(
                self._torch.tensor([list(token_ids)]),
                max_new_tokens=count,
                do_sample=False,
                eos_token_id=None,
            )
        result: list[int] = ids[0, len(token_ids) :].tolist()
        return result

    def _call(
        self, token_ids: Sequence[int], vectors: Mapping[str, NDArray[np.float32]] | None
    ) -> NDArray[np.float32]:
        if vectors is None:
            output = self._model(self._torch.tensor([list(token_ids)]), use_cache=False)
        else:
            inputs = {name: self._torch.from_numpy(v)[None] for name, v in vectors.items()}
            output = self._model(**inputs, use_cache=False)
        logits: NDArray[np.float32] = output.logits[0].numpy(force=True)
        return logits

    def _load(self, binding: Binding) -> Any:
        import transformers

        path, checkpoint = str(binding.checkpoint.path), binding.checkpoint
        loader = transformers.AutoModelForCausalLM
        options: dict[str, Any] = {"dtype": "auto"}
        if binding.prefix.startswith("language_model."):
            # A layout that transformers does not know: load the text model under its own names.
            config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
            options = {
                "config": config.get_text_config(),
                "key_mapping": {r"^language_model\.": ""},
                "dtype": getattr(self._torch, TORCH_DTYPES[checkpoint.dtype]),
            }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model, info = loader.from_pretrained(
                path, local_files_only=True, output_loading_info=True, **options
            )
        missing = sorted(info["missing_keys"])
        if missing:
            raise CheckpointError(
                f"transformers does not find `{missing[0]}` and {len(missing) - 1} other tensors "
                f"in `{path}`, so it cannot serve as the reference",
                hint="build with `--no-verify`, or rename the tensors as transformers has them",
            )
        return model
