"""Commands of both ends together."""
