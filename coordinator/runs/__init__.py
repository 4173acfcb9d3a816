"""Runs: which may begin, who works on them, and the steps that take one to its end."""
