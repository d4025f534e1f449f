"""Pictures at hand: opening, writing and degrading them.

`files` lists picture files and replaces them atomically, `decode` reads pixels, `pictures` is what jobs use (`load`,
`writer`, `save`), `png_stream` writes PNG in bounded memory, `degrade` makes low-resolution inputs, and `samples` are
the photographs that come with scikit-image. Importing this package alone loads none of them.
"""
