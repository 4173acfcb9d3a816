"""What the methods state and what follows from it: the tables of `offsite methods` and `offsite legality`."""
