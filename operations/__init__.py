"""For the operator on call: what ends a worker, or a connection; who may use the state directory; when all are ready.

Each module is an extension of its own, and can be taken away on its own.
"""
