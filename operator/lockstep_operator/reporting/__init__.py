"""What is reported: the status, its conditions, Events, metrics (pure, except for the counters)."""
