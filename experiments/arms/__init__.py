"""The arms: the method beside what it must beat and the controls that could refute it."""
