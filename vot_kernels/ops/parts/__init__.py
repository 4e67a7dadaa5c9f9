"""The parts that several ops share; nothing here is public."""
