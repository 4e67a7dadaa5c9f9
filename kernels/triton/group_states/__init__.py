"""Device code of the states of groups and tiles of tokens, and of their scans."""
