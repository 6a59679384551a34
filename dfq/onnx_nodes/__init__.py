"""Parts of a network in ONNX: values as integers and as real numbers, and the nodes of every kind of step."""
