"""Folding a transformers checkpoint that is larger than memory, into a checkpoint of its kind."""

from normsurgery.folding.checkpoint.folding import fold_checkpoint, plan_checkpoint

__all__ = ["fold_checkpoint", "plan_checkpoint"]
