"""What the operator reads, parsed once into frozen types (pure): the spec, the status, what was observed."""
