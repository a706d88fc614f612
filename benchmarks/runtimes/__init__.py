"""Our bundles and other runtimes side by side: speed, load time, memory, size and KL of one source model."""
