"""The decoding step as an ONNX graph: written from config and weights, and exported with a manifest."""
