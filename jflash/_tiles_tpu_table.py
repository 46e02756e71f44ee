"""Bundles of instructions of the TPU kernels by tile. Written by `benchmarks.tpu_tiles`; not by hand."""

TABLE: dict[tuple[str, int, int, str], dict[tuple[int, int], tuple[int, int, int, int]]] = {}
