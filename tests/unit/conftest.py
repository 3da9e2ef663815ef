"""Properties are tried on the same examples every time; `--hypothesis-profile=default` looks for new ones."""

from __future__ import annotations

import os

from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: there are as many test processes as cores

settings.register_profile("lockstep", derandomize=True, deadline=None)  # a busy machine is no failure
settings.load_profile("lockstep")
