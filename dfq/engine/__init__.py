"""The integer engine: networks of few-bit integers, in files and at work."""

from dfq.engine.graph import IntegerGraph
from dfq.engine.io import load_graph, save_graph
from dfq.engine.run import Engine, load

__all__ = ["Engine", "IntegerGraph", "load", "load_graph", "save_graph"]
