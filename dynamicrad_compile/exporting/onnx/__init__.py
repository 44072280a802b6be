"""ONNX: the ops as functions of standard operators."""
