"""Slots, routing, grouped matrix products and expert bodies of `aoe` and `moe`."""
