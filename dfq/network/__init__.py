"""A network as calls of ATen operators: captured by torch.export, folded, with the names of the user's modules."""

from dfq.network.capture import PrepareError, Network, capture
from dfq.network.calls import Call

__all__ = ["Call", "PrepareError", "Network", "capture"]
