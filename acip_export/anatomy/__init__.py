"""What a model file is made of, byte by byte: any GGUF, ONNX, safetensors, plan or directory. Imports no torch."""

from acip_export.anatomy.diff import TensorChange, diff_tensors
from acip_export.anatomy.model import Anatomy, TensorPart
from acip_export.anatomy.read import read_anatomy

__all__ = ["Anatomy", "TensorChange", "TensorPart", "diff_tensors", "read_anatomy"]
