"""Speed and memory of shl and its peers, interleaved in one run: `make bench BENCH=kernel`."""
