"""The parts of a language model, told by structure: its layers, their roles, and other stacks of the same tensors."""
