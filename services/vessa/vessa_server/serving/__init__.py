"""The path of a request after its body is read: batch queue, worker process, caches."""
