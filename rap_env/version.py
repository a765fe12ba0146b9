"""The version of the package; this file imports nothing."""

__version__ = "0.1.0"
