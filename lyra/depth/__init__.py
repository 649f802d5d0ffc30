"""Depth estimators behind one protocol."""
