"""What depends on somebody else's library: transformers, accelerate, DeepSpeed, quantisation backends.

Each of them is looked up where it is used: without it, the one feature that needs it raises.
"""
