"""Tests of twisted_rtsig.workers: real processes, real sockets."""
