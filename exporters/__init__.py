"""Exports of torch models to files that a runtime executes, each compared with its model before it is written."""
