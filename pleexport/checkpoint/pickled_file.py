"""View the tensors of a `.pth` file without copying them, and without running what it says.

torch's restricted unpickler knows tensors and containers only; see `torch.load(weights_only=True)`.
"""

from __future__ import annotations

import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
from numpy.typing import NDArray

from pleexport.dtypes import BY_TORCH, FLOATS
from pleexport.errors import CheckpointError, MissingDependencyError
from pleexport.safetensors_file import TensorEntry


class PickledFile:
    """A memory-mapped `.pth` file: a dict of dense floating-point tensors.

    Raises:
        CheckpointError: the file is missing, damaged, of the format before torch 1.6, or holds
            anything but tensors.
        MissingDependencyError: torch is not installed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tensors = self._load()
        self.entries: dict[str, TensorEntry] = {
            name: self._entry(name, tensor) for name, tensor in self._tensors.items()
        }

    def array(self, name: str) -> NDArray[Any]:
        """A view of tensor `name` in its stored dtype; nothing is copied."""
        import torch

        tensor = self._tensors[name].detach()
        array: NDArray[Any]
        if tensor.dtype == torch.bfloat16:
            array = tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
        else:
            array = tensor.numpy()
        return array

    def _load(self) -> dict[str, Any]:
        try:
            import torch
        except ImportError as err:
            raise MissingDependencyError(
                f"reading `{self.path.name}` needs torch", hint="pip install 'pleexport[export]'"
            ) from err
        self._refuse_compressed()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what is unusual is read, or an error says so
                loaded = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
        except OSError as err:
            raise CheckpointError(
                f"`{self.path}` cannot be read: {err.strerror}",
                hint="check the file and its permissions",
            ) from err
        except pickle.UnpicklingError as err:
            raise CheckpointError(
                f"`{self.path}` holds more than tensors, or is damaged; nothing of it was run",
                hint="get it from a source that you trust as a file of plain tensors",
            ) from err
        except Exception as err:  # torch raises many kinds for damaged archives
            said = (str(err) or type(err).__name__).splitlines()[0]
            raise CheckpointError(
                f"`{self.path}` is not a file that torch can map: {said}",
                hint="the copy may be damaged, or of the format before torch 1.6: save it again",
            ) from err
        if not isinstance(loaded, dict) or not all(
            isinstance(name, str) and isinstance(tensor, torch.Tensor)
            for name, tensor in loaded.items()
        ):
            raise CheckpointError(
                f"`{self.path}` is not a map from names to tensors",
                hint="save `model.state_dict()` alone",
            )
        return loaded

    def _refuse_compressed(self) -> None:
        """Refuse an archive with compressed parts, which torch never writes and maps all the same.

        Tensors would be read out of compressed bytes, and a small part may unpack to any size.
        """
        try:
            with zipfile.ZipFile(self.path) as archive:
                packed = [p.filename for p in archive.infolist() if p.compress_type]
        except Exception:  # of many kinds for damaged archives; torch says what is wrong
            return
        if packed:
            raise CheckpointError(
                f"`{self.path}`: `{packed[0]}` in it is compressed, so it cannot be mapped",
                hint="load it and save it again with `torch.save`, which compresses nothing",
            )

    def _entry(self, name: str, tensor: Any) -> TensorEntry:
        import torch

        dtype = BY_TORCH.get(str(tensor.dtype).removeprefix("torch."))
        plain = tensor.layout is torch.strided and tensor.device.type == "cpu"
        if (
            dtype is None
            or dtype.name not in FLOATS
            or not plain
            or tensor.is_nested
            or tensor.is_neg()
        ):
            raise CheckpointError(
                f"`{self.path}`: tensor `{name}` is not a plain floating-point one",
                hint="save dense tensors of fp32, fp16, bf16 or fp64 on the CPU",
            )
        size = tensor.numel() * dtype.bits // 8
        if size > (stored := tensor.untyped_storage().nbytes()):
            raise CheckpointError(
                f"`{self.path}`: tensor `{name}` of shape {list(tensor.shape)} needs {size:,} "
                f"bytes, and {stored:,} are stored",
                hint="save `tensor.contiguous()` in place of an expanded view",
            )
        return TensorEntry(name, dtype.name, tuple(tensor.shape), tensor.storage_offset(), size)
