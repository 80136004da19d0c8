"""Tiny trained models of the real architectures, how they were made, and the fixture nodes that feed them.

Nothing here is part of a user's install: the demo and the tests put it into a host of their own.
"""
