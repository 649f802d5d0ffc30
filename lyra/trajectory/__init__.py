"""Where the camera goes: named paths, paths from files and keyframes, and whether a path stays clear of the scene."""
