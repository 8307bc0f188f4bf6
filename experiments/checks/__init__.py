"""Checks on the real weights: the crash test, the validity of the probe, the notebooks."""
