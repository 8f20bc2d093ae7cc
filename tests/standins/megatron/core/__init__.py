"""As little of Megatron as its parallel linear layers need: real processes, real collectives, the same arguments.

For tests where megatron-core is not installed. How the layers share out a weight, and what they sum up on the way back,
is in arXiv:1909.08053; sequence parallelism is in arXiv:2205.05198.
"""
