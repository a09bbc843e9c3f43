"""A checkpoint as an ONNX graph, with operators for KDA."""
