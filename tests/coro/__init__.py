"""Tests of the coroutine adapter, on this package's reactors and on Twisted's."""
