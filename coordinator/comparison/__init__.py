"""Comparing emulators: several ways to tune offsite, measured side by side."""
