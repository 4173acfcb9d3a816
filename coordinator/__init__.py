"""The model owner's end: serves sites and people, keeps the journal, decides for the fleet."""
