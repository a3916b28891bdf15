"""What a model file is made of, byte by byte: any GGUF, ONNX, safetensors, plan or directory. Imports no torch."""

from acip_export.inspection.anatomy import Anatomy, TensorPart
from acip_export.inspection.diff import TensorChange, diff_tensors
from acip_export.inspection.read import read_anatomy

__all__ = ["Anatomy", "TensorChange", "TensorPart", "diff_tensors", "read_anatomy"]
