"""`server` gives tokens their turn: HTTP in front, one engine process per model behind.

It never hears of nibbles: formats, layers and kernels live in `quant` and `csrc`.
"""
