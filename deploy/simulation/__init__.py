"""Virtual sites: the code of a live run without the sockets, the certificates and a process for each site."""
