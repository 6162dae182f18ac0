"""The producers of a stream, as its trainer starts, watches and replaces them."""
