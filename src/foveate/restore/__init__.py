"""The restore wing: super-resolution, rescaling and restoration."""
