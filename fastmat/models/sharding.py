"""What can be told of a module whose parameters are spread over processes."""

from torch import nn


def whole(module: nn.Module) -> bool:
    """Whether the parameters of `module` can be read here and now. Those that DeepSpeed's third stage or FSDP spread
    over processes are whole only inside the forward of the module they belong to."""
    return all(type(p) is nn.Parameter and not hasattr(p, "ds_id") for p in module.parameters())
