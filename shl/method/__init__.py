"""The method, in the order in which it runs: axes, extract, dose, filters, heal, loop."""
