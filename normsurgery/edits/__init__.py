"""Tensor algebra on named tensors, as data: in memory or streamed, in float64, cast once."""
