"""Training at the model's owner."""
