"""Triton kernels, each the twin of a torch reference of the same name (see `offsite.kernels.device`)."""
