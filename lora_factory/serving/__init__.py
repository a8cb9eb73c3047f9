"""Generated adapters in the programs that people run: inference engines, files for them, and a server.

In: a generator or an adapter's folder. Out: adapters that an engine loads, files that it reads, or answers over HTTP.
"""
