"""Data: video decoding and the synthetic world DigitWorld."""
