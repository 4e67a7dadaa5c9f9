"""Training stages; each saves atomically and resumes bit-equal."""
