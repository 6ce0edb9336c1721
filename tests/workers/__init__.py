"""Tests of twisted_rtsig.workers."""
