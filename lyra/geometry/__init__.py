"""Cameras, projection, warps and rotations; depends on nothing else in the project."""
