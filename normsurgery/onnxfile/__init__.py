"""ONNX files as facts: what they take and give, their norms, where their nodes come from; runs."""
