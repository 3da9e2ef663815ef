"""`kubectl lockstep`: what people ask of their models, and do to them, from where kubectl works."""
