"""What people and machines are told: the status, its conditions, Events, metrics (pure, but for the counters)."""
