"""Measurements of speed, each a program that prints a table; none of them is a test."""
