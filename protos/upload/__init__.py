"""What leaves a site: how an update becomes a file, and whether the coordinator lets it in."""
