"""What a checkpoint is: its documents, its formats, its names. Never imports torch."""

__version__ = "0.1.0"
