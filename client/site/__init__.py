"""What runs at a data site: it dials out, trains on data that stay there, and sends back a change of the adapter."""
