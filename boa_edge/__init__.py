"""boa-edge: from a language model to a measured bundle on a phone."""

__version__ = "0.1.0"
