"""The live page: what the operator knows of every model, as it changes. Read-only; it asks nobody anything."""
