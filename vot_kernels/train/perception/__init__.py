"""Training of the head that reads scene graphs off DigitWorld clips."""
