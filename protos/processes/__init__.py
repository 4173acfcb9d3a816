"""Processes that begin warm: forked from one that has imported what they need."""
