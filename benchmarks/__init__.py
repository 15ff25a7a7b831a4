"""Measurements for developers and readers of the README; nothing here is imported by the product."""
