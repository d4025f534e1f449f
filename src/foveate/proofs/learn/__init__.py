"""Proofs of the learn wing."""
