"""Proofs of the generate wing."""
