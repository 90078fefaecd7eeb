"""Exported gated-feedback RNNs in ONNX Runtime: numpy and onnxruntime are all this needs.

`Session(path)` is the model; export (to_onnx), verification and quantization are in modules of their own, which need
torch, and the server in another.
"""

from gfrnn_onnx.names import Metadata, ModelError
from gfrnn_onnx.session import Session
from gfrnn_onnx.state import State

__all__ = ["Metadata", "ModelError", "Session", "State"]
