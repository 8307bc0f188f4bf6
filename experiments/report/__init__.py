"""Reports of a run: table, answers, diary, page and charts, from its record alone."""
