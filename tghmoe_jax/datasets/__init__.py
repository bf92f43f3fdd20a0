"""Published data sets, own manifests, label maps, prepared sets and leaks."""
