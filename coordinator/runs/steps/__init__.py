"""The heavy steps of a run, each a function of documents, run in a worker process.

A step reads and writes files by digest and returns what the journal keeps. Running one twice gives the same result.
"""
