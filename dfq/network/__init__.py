"""A network as calls of ATen operators: captured by torch.export, folded, with the names of the user's modules."""

from dfq.network.calls import Call
from dfq.network.capture import Network, PrepareError, capture

__all__ = ["Call", "Network", "PrepareError", "capture"]
