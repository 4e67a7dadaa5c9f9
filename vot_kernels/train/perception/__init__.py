"""Training of the head that predicts scene graphs, on DigitWorld clips."""
