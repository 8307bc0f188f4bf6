"""Us and the peers, side by side in one run: `make bench`, or `BENCH=kernel make bench`."""
