"""What a model is worth, what an emulator gives away and costs, and what could be done with it."""
