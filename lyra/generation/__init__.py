"""The autoregressive walkthrough loop and what it leaves on disk."""
