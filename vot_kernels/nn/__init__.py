"""Modules over the ops; they need torch alone. Import each from its own file."""
