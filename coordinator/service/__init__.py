"""What is called from outside: the gRPC server, what sites and people call, and how much of it."""
