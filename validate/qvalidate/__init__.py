"""Whether a quantized checkpoint deploys: rules over its headers, then the real engine."""

from qschema import __version__

__all__ = ["__version__"]
