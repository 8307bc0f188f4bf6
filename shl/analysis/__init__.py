"""Looking inside a run: vectors, weight updates, words, doses, sanity checks, plots."""
