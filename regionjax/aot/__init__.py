"""Ahead-of-time compilation: does a config fit a machine, and what would bound its speed there.

`topology` names machines, `programs` makes the abstract programs, `hlo` and its neighbours and
`jaxpr_flops` count what they do, `roofline` turns counts into seconds, `report` shows them and
`search` looks for the largest batch. Nothing here needs the machine: libtpu, or the CUDA plugin,
compiles on any CPU.
"""
