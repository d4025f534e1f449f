"""Many files at once: `run` works through them in several processes, `journal` remembers what is done."""
