"""The shared core: what a run is, and the systems that live in it. Never imports nodes."""
