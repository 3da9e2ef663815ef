"""The one error of loading a model."""

from __future__ import annotations


class ModelError(Exception):
    """The model can't be loaded. The message is a sentence that names the file, tensor or setting to mend."""
