"""Proofs of the restore wing."""
