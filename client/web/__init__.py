"""The web page: runs, rounds and figures in a browser of this machine, through the SDK as any client of it."""
