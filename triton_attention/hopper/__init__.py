"""Kernels in Gluon for Hopper GPUs, which serve an operator where they do not refuse its arguments.

A comment `mutate: name` marks a line that tests/emulate_hopper.py breaks, to see that it is noticed.
"""
