"""Properties are tried on the same examples every time; `--hypothesis-profile=default` looks for new ones."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("lockstep", derandomize=True)
settings.load_profile("lockstep")
