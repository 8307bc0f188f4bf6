"""What is read off a model, and how far each reading can be trusted."""
