"""The command groups of the sites' and the researchers' end."""
