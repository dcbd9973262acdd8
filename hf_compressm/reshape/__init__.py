"""Rewrite a saved training checkpoint to the smaller model, on disk: one module per format of checkpoint."""

from .route import ReshapeReport, reshape_checkpoint

__all__ = ["ReshapeReport", "reshape_checkpoint"]
