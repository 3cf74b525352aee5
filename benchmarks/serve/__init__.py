"""Load on our server and on its peers, one at a time: `python -m benchmarks.serve --help`."""
