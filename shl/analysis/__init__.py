"""Analysis of a run: vectors, weight updates, logit lens, dose-response, sanity checks, plots."""
