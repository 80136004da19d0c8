"""One file per kernel. Knows torch, and nothing of the rest of the pack."""
