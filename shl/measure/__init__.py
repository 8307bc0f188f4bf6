"""Evaluation of a model, and the validity of its instruments."""
