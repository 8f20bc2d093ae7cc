"""The processes that share a weight."""

import torch.distributed as dist

_group = None


def initialize_model_parallel(tensor_model_parallel_size):
    global _group
    _group = dist.new_group(range(tensor_model_parallel_size))


def get_tensor_model_parallel_group():
    return _group


def get_tensor_model_parallel_rank():
    return _group.rank()
