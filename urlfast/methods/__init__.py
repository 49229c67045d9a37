"""One file a method, to be read beside its paper."""
