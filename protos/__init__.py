"""What both ends agree on: services, documents, errors, and how tensors and trust cross the wire."""
