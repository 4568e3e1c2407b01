"""A function's graph as `torch.compile` gives it to a backend."""

import torch


def captured(function, *args):
    """The graph and its inputs."""
    found = []

    def backend(graph, inputs):
        found.append((graph, list(inputs)))
        return graph.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(function, backend=backend, fullgraph=True)(*args)
    (both,) = found
    return both
