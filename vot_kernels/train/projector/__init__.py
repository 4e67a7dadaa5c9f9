"""Alignment of the projector and the graph tokens with the language model, on DigitWorld captions and graphs."""
