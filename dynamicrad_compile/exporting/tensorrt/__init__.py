"""TensorRT: engines with the kernel as an ahead-of-time plugin."""
