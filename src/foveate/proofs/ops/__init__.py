"""Proofs of the systems that are operators at heart."""
