"""What survives: the journal (every state change) and the blobs (every file)."""
