"""A Ray cluster of the owner's machines: begun, joined, looked at and ended. None of it imports Ray but two processes
of its own: what asks a cluster (`asking.py`), and what a machine is held in it by (`holding.py`)."""
