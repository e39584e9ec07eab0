"""Decoding: one engine for evaluation, the command line and Serve. decoder.py is the batch form of it."""
