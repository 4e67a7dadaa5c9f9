"""Linear attention by states: sums over groups of tokens, and scans of these sums."""
