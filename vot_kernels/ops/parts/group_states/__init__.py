"""Linear attention by states: the sums of groups of tokens and their scans."""
