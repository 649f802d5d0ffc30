"""Time grids and denoising loops."""
