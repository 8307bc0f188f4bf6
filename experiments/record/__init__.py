"""The record of a run: what is written to its folder, read back and resumed from."""
