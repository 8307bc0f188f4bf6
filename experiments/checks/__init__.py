"""Checks on real weights: crash and resume, validity of the vignettes, the notebooks."""
