"""Operations with a reference, a CPU path and a Triton path each, one folder per operation."""
