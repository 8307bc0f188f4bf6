"""The CPU speed of a HookedTransformer; results are those of the stock classes."""
