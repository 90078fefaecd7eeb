"""Gated-feedback recurrent networks: the layer, its training and its study."""

__version__ = "0.1.0"
