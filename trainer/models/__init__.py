"""Arithmetic only: the mean anchor, the flow, and the published weights in their classes."""
