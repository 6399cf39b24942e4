"""PersonaPlex: full-duplex speech with a role and a voice, served to many people at once."""

__version__ = "0.1.0"
