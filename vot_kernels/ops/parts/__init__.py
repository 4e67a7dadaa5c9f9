"""What several ops are made of; nothing here is public."""
