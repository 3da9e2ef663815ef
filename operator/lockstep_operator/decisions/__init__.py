"""What is to be done, as actions that carry their reasons (pure)."""
