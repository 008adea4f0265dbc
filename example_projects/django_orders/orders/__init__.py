"""Orders: taken, packed, cancelled, and told of."""
