"""Published adapters in the forms that others take: servers of models, and people who want one model."""
