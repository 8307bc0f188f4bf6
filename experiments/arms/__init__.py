"""The arms: the method, prompting, and the controls, run and compared."""
