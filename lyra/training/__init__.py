"""Procedural worlds and trainers; nothing outside this package imports it."""
