"""What the engine does on a GPU; `python -m benchmarks.gpu --help`.

`compare` holds the kernels against plain torch, `checks` whole models; tests assert on both. `setup` makes
the models, `parts` measures, `report` keeps the results, `chart` draws them.
"""
