"""Checks that need a GPU, each a module to run by itself."""
