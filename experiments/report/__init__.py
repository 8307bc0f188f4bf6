"""What is shown of a run: table, answers, page and plots, from its record alone."""
