"""From a walkthrough to Gaussians."""
