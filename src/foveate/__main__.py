"""python -m foveate: the command line."""

from foveate.cli import main

main()
