"""What is trained: model families, emulators of their middle, adapters, and how well each predicts a text."""
