"""Everything about a model: files, signature, versions, and the versions in memory. Knows nothing of HTTP."""
