"""The ops inside other libraries, and as other libraries want them."""
