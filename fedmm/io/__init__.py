"""Run directories, checkpoints, manifests."""
