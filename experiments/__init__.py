"""The program that runs the study; it imports `shl`, never the other way round."""
