"""Inversion: real images to bank rows, one module a method."""
