"""`rap serve` and llama.cpp in equal memory: ``python -m experiments.studies.equal_process``.

Both serve one GGUF file, each in a process of its own whose resident memory is limited. `rap
serve` gets the limit; of llama.cpp's files and caches the best one takes part whose server was
within it. Files are made by llama.cpp's own programs, with an importance matrix of the file
itself. All are compared with the weights of the file in float32, on the same windows.

- `rows`: what is recorded, and its tables and figure
- `study`: how it is measured
"""
