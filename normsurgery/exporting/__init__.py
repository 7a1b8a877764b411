"""From a torch model to an ONNX file that is proven to compute the same."""
