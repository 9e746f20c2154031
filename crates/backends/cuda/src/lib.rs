//! NVIDIA GPU backend: a plan captured as one graph.
