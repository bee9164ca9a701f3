"""For the operator on call: what ends a worker, who may use the state directory, when all workers are ready.

Each module is an extension of its own, and can be taken away on its own.
"""
