"""`make gpu`: correctness, races and benchmarks on one CUDA GPU, without network, in stages of at most ten minutes.

- `python -m bench.gpu` runs every stage that is not finished yet; STAGE=name runs one. What a stage measured is kept
  row by row in OUT (default gpu-results), so a stage that was cut off goes on where it stopped.
- It uses the Python it is started with and that Python's PyTorch, Triton and transformers; it downloads and installs
  nothing. WHEELS=folder may hold wheels: ours gives the tokenizer's compiled engine, others (pytest, hypothesis, …) are
  unpacked under build/ and put on the path. `python -m bench.gpu wheels FOLDER` gathers such a folder where there is a
  network.
- `python -m bench.gpu prove` enters a GPU whose correctness stage has passed, with its Triton, in the table of those
  whose attention takes the Hopper kernels (HOPPER_PROVEN in kernels/targets.py).
- `--rehearse` runs the same stages on the CPU with tiny shapes.
- It reads the card as it finds it: no clock, power limit or mode is ever changed.
"""
