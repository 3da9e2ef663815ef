"""What is known of each group: its pods from outside, its own report from inside."""
