"""Other libraries on the same problems, in one process, by turns: `python -m benchmarks.peers`, or `make peers`.

One module a library. Each imports it inside its functions, so that a missing one raises ImportError there and costs its
rows only.
"""
