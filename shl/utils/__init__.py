"""Shapes, errors, seeds and files: nothing of the method."""
