"""Networks and the names of their weights."""
