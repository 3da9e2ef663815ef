"""The Kubernetes operator: keeps every TensorParallelModel as its spec says, and tells the truth about it."""
