"""The spatial memory: what is stored, what is retrieved, and how the network is told."""
