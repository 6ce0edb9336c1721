"""Tests of twisted_rtsig.files."""
