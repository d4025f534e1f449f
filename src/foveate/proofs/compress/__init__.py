"""Proofs of the compress wing."""
