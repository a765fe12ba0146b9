"""The ladder of precision: loss against bytes, and what llama.cpp offers for the same file."""
