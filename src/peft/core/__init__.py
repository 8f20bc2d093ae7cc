"""The mechanism: which modules an adapter goes on, and everything that can be done with it there.

This room knows torch and the configurations. It knows no method, no transformers and no hub.
"""
