"""The tests of this package: real sockets, real signals, real processes."""
