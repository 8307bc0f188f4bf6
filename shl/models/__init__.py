"""Models: loading, tokens, generation, scores, activations, export."""

from shl.models.load import load_model

__all__ = ["load_model"]
