"""Training of the encoder by distillation and contrast."""
