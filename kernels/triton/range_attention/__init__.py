"""Device code of softmax attention over ranges of keys, with the far part of hybrid attention."""
