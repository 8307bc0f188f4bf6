"""Shapes, errors, seeds and files, independent of the method."""
