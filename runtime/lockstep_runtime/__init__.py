"""The serving runtime: supervisor, engine, API and tensor-parallel workers. Importing it never imports torch."""

__version__ = "0.1.0"
