"""Checkpoint to bundle: resolve → merge → onnx → parity → manifest, each step a function."""
