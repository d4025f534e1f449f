"""The learn wing: losses, and what is trained by them."""
