"""Proofs of the recognize wing."""
