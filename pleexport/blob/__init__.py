"""The blob: all rows of all tables in one memory-mappable safetensors file."""

from pleexport.blob.reader import Blob
from pleexport.blob.writer import write_blob

__all__ = ["Blob", "write_blob"]
