"""Proofs of the curate wing, one module per system."""
