"""Image captioning: a CNN looks, an LSTM writes."""
