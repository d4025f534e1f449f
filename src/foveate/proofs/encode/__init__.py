"""Proofs of the encode wing."""
