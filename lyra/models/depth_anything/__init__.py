"""Depth Anything 3: depth, cameras and raw Gaussians of any number of views, with the released parameter names.

Licences of the public weights: nested-giant-large, giant and large are CC BY-NC 4.0; base, small, mono-large and
metric-large are Apache-2.0.
"""
