"""The questions that a run answers, from its record alone."""
