"""The command groups of the owner's end; each loads its heavy parts when it runs."""
