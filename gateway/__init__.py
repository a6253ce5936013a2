"""Everything that awaits: the HTTP edge, carrying out a mode, backends, and the composition root."""

__version__ = "0.1.0"
