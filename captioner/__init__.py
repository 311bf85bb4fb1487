"""Image captioning: a CNN looks, an LSTM writes."""

__version__ = "0.1.0"
