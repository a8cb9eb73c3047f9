"""Generated adapters in the programs that people run: an HTTP server, inference engines, and files for them.

In: a generator, or an adapter's folder. Out: adapters that an engine loads, files that it reads, answers over HTTP.
"""
