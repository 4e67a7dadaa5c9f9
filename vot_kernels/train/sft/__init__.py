"""Supervised finetuning on Video-of-Thought traces from DigitWorld's ground truth."""
