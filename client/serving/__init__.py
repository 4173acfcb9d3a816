"""A first look at published adapters over HTTP, in the form of OpenAI's API, for this machine alone."""
